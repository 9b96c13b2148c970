"""Registered models: whose they are, their versions, and which one a name means."""

import contextlib
from collections.abc import Mapping
from typing import NamedTuple

from mlflow.exceptions import MlflowException

from plumbline.addresses import without_credentials
from plumbline.errors import ParamsError, PlumblineError
from plumbline.project import find_project
from plumbline.refs import ModelRef
from tasks.experiments import experiment_name, is_own_store, store_uri
from tasks.mlflow_client import client

PROJECT_TAG = "plumbline.project"
"""Of a registered model: the project that made it."""

MODEL = "plumbline-policy"
"""The registered model that is meant where none is named."""
CHAMPION, CHALLENGER = "champion", "challenger"


class Version(NamedTuple):
    """A version of a registered model."""

    name: str
    number: str
    tags: dict[str, str]
    model: ModelRef

    @property
    def called(self) -> str:
        """NAME/NUMBER, as a user names it."""
        return f"{self.name}/{self.number}"

    @property
    def run_id(self) -> str:
        """The pipeline's run that registered it; empty where it was not one of this project's."""
        return self.tags.get("plumbline.run_id", "")


def register_model(
    name: str, model: ModelRef, tags: Mapping[str, str], description: str = ""
) -> str:
    """Make a version of a registered model from a logged model; returns the version's number."""
    with contextlib.suppress(MlflowException):
        client().create_registered_model(name, {PROJECT_TAG: experiment_name()})
    made = client().create_model_version(
        name,
        source=f"models:/{model.mlflow_model_id}",
        run_id=model.mlflow_run_id,
        model_id=model.mlflow_model_id,
        tags=dict(tags),
        description=description,
    )
    return str(made.version)


def check_owner(name: str) -> None:
    """Check that a registered model is no other project's, on a server that others may use.

    Raises:
        ParamsError: it is.
    """
    if is_own_store(find_project().home):
        return
    owner = None
    # There is none yet.
    with contextlib.suppress(MlflowException):
        owner = client().get_registered_model(name).tags.get(PROJECT_TAG)
    if owner not in (None, experiment_name()):
        raise ParamsError(
            f"registry.name: expected a registered model of this project ({experiment_name()}), "
            f"got {name}, which on {without_credentials(store_uri())} is the project {owner}'s: "
            "versions and aliases of both would mix. Set registry.name to another name, or, if it "
            f"is the same project in another folder, MLFLOW_EXPERIMENT_NAME={owner}."
        )


def version_exists(name: str, version_number: str) -> bool:
    """Whether the registry has this version of the model."""
    try:
        return client().get_model_version(name, version_number) is not None
    except MlflowException:
        return False


def full_name(text: str) -> str:
    """NAME@ALIAS or NAME/NUMBER: a bare word is an alias, a bare number a version."""
    if "@" in text or "/" in text:
        return text
    return f"{MODEL}/{text}" if text.isdecimal() else f"{MODEL}@{text}"


def find_version(text: str) -> Version | None:
    """The version that a name means; None where the registry has none.

    Args:
        text: NAME@ALIAS, NAME/NUMBER, or an alias or number of `MODEL`.

    Raises:
        PlumblineError: the version's model is gone from MLflow.
    """
    full = full_name(text)
    try:
        if "@" in full:
            name, _, alias = full.rpartition("@")
            found = client().get_model_version_by_alias(name, alias)
        else:
            name, _, number = full.rpartition("/")
            found = client().get_model_version(name, number)
    except MlflowException:
        return None
    tags = dict(found.tags)
    model_id = str(found.source).removeprefix("models:/")
    try:
        logged = client().get_logged_model(model_id)
    except MlflowException as error:
        raise PlumblineError(
            f"{name}/{found.version}: its model {model_id} is gone from MLflow ({error}). Delete "
            "the version there, or let the alias name another one."
        ) from error
    model = ModelRef(
        digest=tags.get("plumbline.digest", ""),
        uri=logged.artifact_location,
        mlflow_run_id=str(found.run_id),
        mlflow_model_id=model_id,
    )
    return Version(str(name), str(found.version), tags, model)


def need_version(text: str, otherwise: str) -> Version:
    """The version that a name means.

    Args:
        text: as `find_version` takes it.
        otherwise: what to do where there is none.

    Raises:
        ParamsError: the registry has none.
        PlumblineError: the version's model is gone from MLflow.
    """
    version = find_version(text)
    if version is None:
        raise ParamsError(
            f"No registered model {full_name(text)}: expected NAME@ALIAS, NAME/NUMBER, or an alias "
            f"or number of {MODEL}. {otherwise}"
        )
    return version


def tag_version(version: Version, tags: Mapping[str, str]) -> None:
    """Set tags on a version."""
    for key, value in tags.items():
        client().set_model_version_tag(version.name, version.number, key, value)
