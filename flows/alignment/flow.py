"""The alignment flow: from data to a registered policy, a cached task a step."""

import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from prefect import flow, runtime
from prefect.context import TagsContext

from flows.alignment.gpu import COMPUTING, gpu_slot
from flows.alignment.headline import headline_metrics
from flows.alignment.naming import flow_run_name, run_name
from flows.alignment.place import place_in_sweep
from flows.alignment.planning import pinned_data
from flows.alignment.reports import Origin, read_samples, write_report
from flows.alignment.run_page import show_links, show_results
from flows.alignment.summary import RunSummary, StepSummary
from flows.alignment.wiring import wiring
from flows.services.pages import mlflow_pages
from flows.stopping import cancellable
from plumbline.artifacts import DigestCache
from plumbline.checks import check_experiment, check_files
from plumbline.errors import ParamsError, PlumblineError
from plumbline.params.loader import Loaded, flatten, load_experiment
from plumbline.params.schema import StepName
from plumbline.project import Project, find_project, make_home
from plumbline.refs import DataVersion, RegistrationRef, StepResult
from plumbline.training.memory import release_memory
from tasks import registry, tracking
from tasks.aliases import move_alias, note_version
from tasks.base_model import base_model
from tasks.bookkeeping import close_dead_runs
from tasks.checkpoints import discard_checkpoints
from tasks.data_objects import version_at
from tasks.data_version import git_state
from tasks.dpo import dpo
from tasks.evaluate import evaluate
from tasks.judge import judge
from tasks.keys import cache_key, digest_cache, ingredients
from tasks.locks import step_lock
from tasks.prepare_data import prepare_data
from tasks.progress import quiet_libraries, show_note, show_warning
from tasks.records import damage, read_result, write_ingredients
from tasks.register import register
from tasks.reward_model import reward_model
from tasks.rl import rl
from tasks.sft import sft
from tasks.sources import edited_sources, note_functions

TASKS: dict[StepName, Any] = {
    "prepare_data": prepare_data,
    "base_model": base_model,
    "sft": sft,
    "reward_model": reward_model,
    "judge": judge,
    "rl": rl,
    "dpo": dpo,
    "evaluate": evaluate,
    "register": register,
}


@flow(name="align", flow_run_name=flow_run_name, persist_result=False)
def align(
    experiment: str = "quickstart",
    overrides: list[str] | None = None,
    refresh: list[StepName] | None = None,
    allow_dirty: bool = False,
    data_rev: str = "",
) -> RunSummary:
    """Run an alignment experiment; steps whose inputs did not change come from the cache.

    Args:
        experiment: Name of a file in params/.
        overrides: Changes to its params, each as key=value, for example rl.kl_coef=0.1.
        refresh: Steps to run again although nothing changed.
        allow_dirty: Accept data that differs from data.dvc, and tag the run so.
        data_rev: Version of the data to run on, whatever is in data/; none: that of data.dvc.
    """
    started = time.perf_counter()
    quiet_libraries()
    project = find_project()
    make_home(project.home)
    loaded = load_experiment(experiment, project.params, overrides or ())
    note_functions(loaded.experiment.functions())
    check_experiment(loaded.experiment, project.root)
    _check_unedited()
    data = _find_data(project, loaded, data_rev, allow_dirty)
    check_files(loaded.experiment, data.files)
    registry.check_owner(loaded.experiment.registry.name)
    if place := place_in_sweep():
        # The sweep itself has closed what dead runs left open.
        place.check(loaded.experiment, data)
    else:
        close_dead_runs(project.home)
    run, origin = _open_run(project, loaded, data)
    pages = mlflow_pages(project, run.experiment_id)
    show_links(run.name, run.mlflow_run_id, pages)
    state: tracking.RunState = "KILLED"
    metrics: dict[str, float] = {}
    try:
        with cancellable(str(runtime.flow_run.id)):
            steps, results = _run_steps(project, loaded, data, run, refresh or ())
        metrics = {name: v for result in results.values() for name, v in result.metrics.items()}
        registered = _point_alias(project, loaded, results)
        seconds = time.perf_counter() - started
        summary = RunSummary(
            experiment=loaded.name,
            data={"rev": data.rev, "digest": data.digest},
            mlflow_run_id=run.mlflow_run_id,
            prefect_flow_run_id=str(runtime.flow_run.id),
            seconds=round(seconds, 3),
            steps=steps,
            metrics=metrics,
            report=str(project.reports / run.name),
            samples=read_samples(results["evaluate"]),
            registered=registered,
        )
        report = write_report(project, summary, results, origin, pages)
        show_results(summary, results, report)
        state = "FINISHED"
    except Exception:
        state = "FAILED"
        raise
    finally:
        tracking.end_run(run.mlflow_run_id, state, headline_metrics(metrics))
    if "alias" in registered:
        # Last: where it is noted, a run with nothing to do says that this one is finished.
        note_version(project.home, **registered, current=tracking.aliased_version)
    return summary


def _check_unedited() -> None:
    """What was imported must be what the cache keys are made of."""
    if edited := edited_sources():
        raise PlumblineError(
            f"The code was edited while the run started: {', '.join(edited)}. Run again."
        )


def _find_data(project: Project, loaded: Loaded, rev: str, allow_dirty: bool) -> DataVersion:
    if not rev:
        return pinned_data(project, loaded.experiment, allow_dirty=allow_dirty)
    if allow_dirty:
        raise ParamsError(
            f"allow_dirty is about edits in data/, and data_rev={rev} reads none of it; leave out "
            "the one or the other"
        )
    return version_at(project.root, loaded.experiment.data.path, rev)


def _open_run(
    project: Project, loaded: Loaded, data: DataVersion
) -> tuple[tracking.PipelineRun, Origin]:
    named = run_name(loaded.name, loaded.overrides)
    name = f"{named}-{time.strftime('%Y%m%d-%H%M%S')}-{runtime.flow_run.id[:4]}"
    tags = {
        "plumbline.experiment": loaded.name,
        "plumbline.overrides": json.dumps(loaded.overrides),
        "prefect.flow_run_id": str(runtime.flow_run.id),
        "data.rev": data.rev,
        "data.digest": data.digest,
        "data.dirty": str(data.dirty).lower(),
        **git_state(project.root),
    }
    # What MLflow's table of runs shows as their source.
    tags |= {"mlflow.source.name": f"params/{loaded.name}.yaml", "mlflow.source.type": "LOCAL"}
    if commit := tags.get("git.commit"):
        tags["mlflow.source.git.commit"] = commit
    if place := place_in_sweep():
        tags |= place.tags()
    run = tracking.start_pipeline(
        name,
        project.home,
        flatten(loaded.experiment),
        tags,
        experiment=loaded.experiment.model_dump(mode="json"),
    )
    tracking.log_pipeline_dataset(run, data.path, data.digest, data.path, len(data.files))
    return run, Origin(name, loaded.overrides, tags)


def _run_steps(
    project: Project,
    loaded: Loaded,
    data: DataVersion,
    run: tracking.PipelineRun,
    refresh: Sequence[StepName],
) -> tuple[dict[str, StepSummary], dict[str, StepResult]]:
    """Run or fetch every step; returns what happened and what came of it."""
    steps: dict[str, StepSummary] = {}
    results: dict[str, Any] = {"data": data}
    digests = digest_cache(project)
    computed = False
    for name, make_arguments in wiring(loaded.experiment).items():
        arguments = make_arguments(results)
        parts = ingredients(name, arguments)
        key = cache_key(name, parts)
        began = time.perf_counter()
        own = run.model_copy(update={"key": key, "checkpoints": loaded.experiment.checkpoints})
        with step_lock(project.home, key, waiting=partial(_say_waiting, name)):
            fresh = name in refresh or not _is_made(project, name, key, digests)
            # Before the result, which a kill may leave alone: a plan explains by them.
            write_ingredients(project.home, key, parts)
            task = TASKS[name].with_options(refresh_cache=fresh)
            if fresh and name in COMPUTING:
                # Takes a tenth of a second, and only a step that computes needs the room.
                if computed:
                    release_memory()
                computed = True
            # The flow run's tags on a task would be names of limits, each asked of the server.
            with TagsContext(current_tags=set()), gpu_slot(name, fresh):
                state = task(**arguments, run=own, return_state=True)
            results[name] = state.result()
            ran = state.name != "Cached"
            discard_checkpoints(project.home, key)
            # Under the lock, so that what a run refers to is known before it can be collected.
            if ran:
                run_id = results[name].mlflow_run_id
                tracking.tag_run(run_id, {"plumbline.digest": results[name].digest})
            else:
                run_id = tracking.stub_run(run, name, key, results[name])
        steps[name] = StepSummary(
            status="ran" if ran else "cached",
            seconds=round(time.perf_counter() - began, 3),
            key=key,
            digest=results[name].digest,
            mlflow_run_id=run_id,
        )
    digests.save()
    del results["data"]
    return steps, results


def _is_made(project: Project, step: StepName, key: str, digests: DigestCache) -> bool:
    """Whether the step's result is there and whole; Prefect would take it without a look."""
    earlier = read_result(project.results, step, key)
    return earlier is not None and not _warn_if_damaged(step, earlier, digests)


def _say_waiting(step: StepName, holder: str) -> None:
    show_note(f"{step}: process {holder} is at it; waiting for its result")


def _warn_if_damaged(step: StepName, result: StepResult, digests: DigestCache) -> bool:
    why = damage(result, digests)
    if isinstance(result, RegistrationRef) and not registry.version_exists(
        result.name, result.version
    ):
        why = f"version {result.version} of {result.name} is gone from the registry"
    if why:
        show_warning(f"{step}: {why}; the step runs again")
    return why is not None


def _point_alias(
    project: Project, loaded: Loaded, results: dict[str, StepResult]
) -> dict[str, str]:
    """Let the alias name this run's model: a cached step does not move it back by itself.

    Of the points of a sweep the best gets it, when all have ended.
    """
    made = results["register"]
    assert isinstance(made, RegistrationRef)
    if place_in_sweep():
        return {"name": made.name, "version": made.version}
    alias = loaded.experiment.registry.alias
    point = partial(tracking.point_alias, made.name, alias, made.version)
    move_alias(project.home, made.name, alias, point)
    return {"name": made.name, "version": made.version, "alias": alias}
