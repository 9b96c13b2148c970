"""What can be checked of an experiment on this machine before anything is trained."""

from collections.abc import Collection
from pathlib import Path

from plumbline.data.formats import SUFFIXES, find_table
from plumbline.errors import DataError
from plumbline.functions import load_function
from plumbline.models.context import check_model
from plumbline.params.schema import Experiment


def check_tables(experiment: Experiment, root: Path) -> None:
    """Check that the data set has the table that the reward model learns from.

    Raises:
        DataError: it has none.
    """
    if experiment.reward_model.objective == "pointwise":
        found = find_table(root / experiment.data.path, "ratings")
        check_files(experiment, [found.name] if found else [])


def check_files(experiment: Experiment, names: Collection[str]) -> None:
    """Check that a data set of these files has the table that the reward model learns from.

    Raises:
        DataError: it has none.
    """
    pointwise = experiment.reward_model.objective == "pointwise"
    if pointwise and not any(f"ratings{suffix}" in names for suffix in SUFFIXES):
        raise DataError(
            f"reward_model.objective=pointwise learns from ratings: expected the table ratings in "
            f"{experiment.data.path}, got none. Add ratings.jsonl with prompt, response and label, "
            "or set reward_model.objective to pairwise."
        )


def check_experiment(experiment: Experiment, root: Path) -> None:
    """Check the model, its context, and the functions that the params name.

    Raises:
        ParamsError: one of them is missing or does not fit.
    """
    check_model(experiment, root)
    for function, param in experiment.functions().items():
        load_function(function, param)
