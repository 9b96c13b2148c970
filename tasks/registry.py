"""Versions of registered models: which one a name means, what made it, and their aliases."""

from collections.abc import Mapping
from typing import NamedTuple

from mlflow.exceptions import MlflowException

from plumbline.errors import ParamsError, PlumblineError
from plumbline.refs import ModelRef
from tasks.mlflow_client import client

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
