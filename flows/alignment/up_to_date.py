"""A run with nothing to do: every step's result is there, and all that is left is to say so.

Imports no framework, so that it takes no longer than a plan.
"""

import time

from flows.alignment.planning import Finished, finished
from flows.alignment.summary import RunSummary, StepSummary
from plumbline.params.loader import Loaded
from plumbline.project import Project
from plumbline.refs import DataVersion, RegistrationRef
from tasks.aliases import noted_version


def up_to_date(
    project: Project, loaded: Loaded, data: DataVersion, started: float
) -> RunSummary | None:
    """What a run would bring out, if it has nothing to do: no step to run, no alias to move.

    Args:
        project: the project.
        loaded: the experiment.
        data: the verified data.
        started: when the command began, `time.perf_counter()`.
    """
    steps = finished(project, loaded.experiment, data)
    if steps is None:
        return None
    made = steps["register"].result
    assert isinstance(made, RegistrationRef)
    alias = loaded.experiment.registry.alias
    if noted_version(project.home, made.name, alias) != made.version:
        return None
    return RunSummary(
        experiment=loaded.name,
        data={"rev": data.rev, "digest": data.digest},
        mlflow_run_id=None,
        prefect_flow_run_id=None,
        seconds=round(time.perf_counter() - started, 3),
        steps={name: cached_step(step) for name, step in steps.items()},
        metrics={k: v for step in steps.values() for k, v in step.result.metrics.items()},
        report=None,
        samples=[],
        registered={"name": made.name, "version": made.version, "alias": alias},
    )


def cached_step(step: Finished) -> StepSummary:
    """What a run says of a step that has nothing to do."""
    return StepSummary(
        status="cached",
        seconds=0.0,
        key=step.key,
        digest=step.result.digest,
        mlflow_run_id=step.result.mlflow_run_id,
    )
