"""Validation of an experiment's data without a run."""

import tempfile
from pathlib import Path

from plumbline.data.prepare import prepare
from plumbline.params.schema import Experiment
from plumbline.project import Project
from tasks.validation import limits_of, token_counter


def check_data(project: Project, experiment: Experiment) -> dict[str, int]:
    """Validate the data set as a run would; returns its rows by table and split.

    Raises:
        InvalidData: rows break rules; it has all of them.
    """
    with tempfile.TemporaryDirectory() as temporary:
        prepared = prepare(
            project.root / experiment.data.path,
            Path(temporary, "prepared"),
            test_fraction=experiment.data.test_fraction,
            on_invalid="fail",
            limits=limits_of(experiment.data),
            counter_for=token_counter(experiment.model, project.root),
            long_prompts=experiment.data.long_prompts,
        )
    return prepared.rows
