"""Tests of flows.environment: what is set before any framework is imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows.environment import prepare_environment
from plumbline.project import Project


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the test change the environment."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_user_and_password_are_taken_out_of_the_server_s_address(
    environment: None, tmp_path: Path
) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = "https://me:a%2Fb@mlflow.example:8443/base"

    prepare_environment(Project(tmp_path, tmp_path))

    assert os.environ["MLFLOW_TRACKING_URI"] == "https://mlflow.example:8443/base"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "a/b"


def test_a_password_alone_is_taken_out_too(environment: None, tmp_path: Path) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = "https://:secret@mlflow.example"
    os.environ["MLFLOW_TRACKING_USERNAME"] = "me"

    prepare_environment(Project(tmp_path, tmp_path))

    assert os.environ["MLFLOW_TRACKING_URI"] == "https://mlflow.example"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "secret"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "sqlite:////a/mlflow.db", "databricks"])
def test_an_address_without_a_password_stays_as_it_is(
    environment: None, tmp_path: Path, uri: str
) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = uri
    prepare_environment(Project(tmp_path, tmp_path))
    assert os.environ["MLFLOW_TRACKING_URI"] == uri
