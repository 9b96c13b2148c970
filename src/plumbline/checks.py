"""What can be checked of an experiment on this machine before anything is trained."""

from pathlib import Path

from plumbline.functions import load_function
from plumbline.models.context import check_model
from plumbline.params.schema import Experiment


def check_experiment(experiment: Experiment, root: Path) -> None:
    """Check the model, its context, and the functions that the params name.

    Raises:
        ParamsError: one of them is missing or does not fit.
    """
    check_model(experiment, root)
    for section in (experiment.rl, experiment.evaluate):
        for function, param in section.functions().items():
            load_function(function, param)
