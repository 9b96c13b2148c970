"""Databases of the installation, and what becomes of them."""

import sqlite3
from contextlib import closing
from importlib.metadata import version

import pytest
from mlflow import MlflowClient

from tasks import templates
from tasks.templates import copy_template


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = tmp_path / "share"
    made.mkdir()
    monkeypatch.setattr(templates, "FOLDER", made)
    return made


def test_a_template_is_copied_to_where_no_database_is(folder, tmp_path):
    (folder / f"mlflow-{version('mlflow')}.db").write_bytes(b"tables")

    copy_template("mlflow", tmp_path / "mlflow.db")

    assert (tmp_path / "mlflow.db").read_bytes() == b"tables"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "share"]


def test_a_database_that_is_there_stays(folder, tmp_path):
    (folder / f"prefect-{version('prefect')}.db").write_bytes(b"tables")
    (tmp_path / "prefect.db").write_bytes(b"rows")

    copy_template("prefect", tmp_path / "prefect.db")

    assert (tmp_path / "prefect.db").read_bytes() == b"rows"


def test_a_template_of_another_version_is_none(folder, tmp_path):
    (folder / "mlflow-0.1.db").write_bytes(b"tables")

    copy_template("mlflow", tmp_path / "mlflow.db")

    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("with_template", [True, False])
def test_a_store_is_the_same_with_a_template_and_without(
    with_template, tmp_path, monkeypatch, open_store
):
    from tasks.tracking import client

    if not with_template:
        monkeypatch.setattr(templates, "FOLDER", tmp_path / "nowhere")
    elif not templates.template("mlflow").exists():
        pytest.skip("python -m flows.services.preparing was not run in this environment")
    database = tmp_path / "home" / "mlflow.db"
    open_store(f"sqlite:///{database}")
    client()

    found = MlflowClient(f"sqlite:///{database}").search_experiments()
    assert [(one.experiment_id, one.name) for one in found] == [("0", "Default")]
    # Where MLflow would put it by itself: in the folder of this process.
    assert str(tmp_path.cwd()) in found[0].artifact_location
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("pragma journal_mode").fetchone() == ("wal",)
