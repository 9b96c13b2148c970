"""Which MLflow experiment holds a project's runs, so that projects on one server stay apart."""

import json
import os
from pathlib import Path
from typing import Any

from plumbline.project import find_project

UNNAMED = "plumbline"
"""The experiment of a project whose folder has no name."""
VIEW = "plumbline"
"""Key of the view of an experiment's runs that shows what they are compared by."""
COLUMNS = (
    "attributes.`Created`",
    "attributes.`Duration`",
    "metrics.`eval/win_rate`",
    "metrics.`eval/policy/gold`",
    "metrics.`eval/policy/judge`",
    "metrics.`eval/policy/score`",
    "metrics.`eval/policy/kl`",
    "metrics.`reward_model/accuracy`",
    "params.`rl.algorithm`",
    "params.`rl.kl_coef`",
)
"""Of that view, by MLflow's names; without it the table of runs shows no metric at first."""


def experiment_name() -> str:
    """The experiment of this project: MLFLOW_EXPERIMENT_NAME, or else its folder's name."""
    named = os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip()
    return named or find_project().root.name or UNNAMED


def view_tag() -> dict[str, str]:
    """The tag of an experiment in which MLflow keeps a view that its pages can be linked with."""
    return {f"mlflow.sharedViewState.{VIEW}": json.dumps({"selectedColumns": COLUMNS})}


def experiment_ids(runs: Any, home: Path | None) -> list[str]:
    """The experiments to look for a project's runs in.

    All that are in a store of its own, whatever the folder was called when they were made; in one
    that others may use, that of this project's name.

    Args:
        runs: MLflow's client.
        home: this project's folder for generated files; None where the client's store is that of
            another folder.
    """
    if home is None or is_own_store(home):
        return [str(found.experiment_id) for found in runs.search_experiments()]
    found = runs.get_experiment_by_name(experiment_name())
    return [] if found is None else [str(found.experiment_id)]


def store_uri() -> str:
    """Where MLflow keeps its runs."""
    # Who only asks for a name needs no MLflow.
    import mlflow

    return str(mlflow.get_tracking_uri())


def is_own_store(home: Path) -> bool:
    """Whether MLflow's store is the database in the project's folder, which nothing else uses."""
    uri = store_uri()
    path = Path(uri.removeprefix("sqlite:///"))
    return uri.startswith("sqlite:///") and path.resolve() == (home / "mlflow.db").resolve()
