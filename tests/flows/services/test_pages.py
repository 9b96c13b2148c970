"""Tests of flows.services.pages: where links to MLflow lead, with a server and without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.markdown import link
from flows.services.pages import mlflow_pages
from flows.services.processes import MLFLOW, Address, Service, State, write_state
from plumbline.process import identity
from plumbline.project import Project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return Project(tmp_path, tmp_path)


def test_without_a_server_links_lead_to_where_up_starts_one_and_say_so(project):
    pages = mlflow_pages(project, "1")

    assert pages.run("ab") == "http://127.0.0.1:5000/#/experiments/1/runs/ab"
    assert pages.model("m-1") == "http://127.0.0.1:5000/#/experiments/1/models/m-1"
    assert "`plumbline up` starts it at http://127.0.0.1:5000" in pages.how_to_open


def test_links_lead_to_the_server_that_up_has_started(project):
    service = Service(process=identity(), since="", log="", address=Address("0.0.0.0", 5001))
    write_state(project.home, State(services={MLFLOW: service}))

    pages = mlflow_pages(project, "1")

    assert pages.version("a model", "3") == "http://127.0.0.1:5001/#/models/a%20model/versions/3"
    assert pages.how_to_open == ""


def test_links_to_a_named_server_have_no_password(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example/base/")

    address = mlflow_pages(project, "7").runs()
    assert address.startswith("https://mlflow.example/base/#/experiments/7/runs?")


def test_a_link_s_text_is_taken_as_it_is():
    assert link("a](http://evil) <b>", "/x") == r"[a\]\(http://evil\) \<b\>](/x)"
