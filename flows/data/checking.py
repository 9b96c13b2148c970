"""Validation of an experiment's data without a run."""

import tempfile
from pathlib import Path
from typing import Literal

from plumbline.checks import check_files
from plumbline.data.prepare import Prepared, prepare
from plumbline.params.schema import Experiment
from plumbline.project import Project
from plumbline.refs import DataVersion
from tasks.data_version import snapshot
from tasks.validation import limits_of, token_counter


def check_data(project: Project, experiment: Experiment) -> dict[str, int]:
    """Validate the data set as a run would; returns its rows by table and split.

    Raises:
        InvalidData: rows break rules; it has all of them.
    """
    folder = project.root / experiment.data.path
    with tempfile.TemporaryDirectory() as temporary:
        return _prepare(project, experiment, folder, Path(temporary), "fail").rows


def check_version(project: Project, experiment: Experiment, data: DataVersion) -> Prepared:
    """Validate a version of the data set as a run on it would, whatever is in data/.

    Rows that the experiment sets aside are among the failures of what is returned.

    Raises:
        InvalidData: rows break rules, and the experiment does not set them aside.
        DataError: the version lacks a table.
    """
    check_files(experiment, data.files)
    with tempfile.TemporaryDirectory() as temporary:
        folder = snapshot(project.root, data, Path(temporary))
        on_invalid = experiment.data.on_invalid
        return _prepare(project, experiment, folder, Path(temporary), on_invalid)


def _prepare(
    project: Project,
    experiment: Experiment,
    folder: Path,
    temporary: Path,
    on_invalid: Literal["fail", "quarantine"],
) -> Prepared:
    return prepare(
        folder,
        temporary / "prepared",
        test_fraction=experiment.data.test_fraction,
        on_invalid=on_invalid,
        limits=limits_of(experiment.data),
        counter_for=token_counter(experiment.model, project.root),
        long_prompts=experiment.data.long_prompts,
    )
