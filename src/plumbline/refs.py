"""What steps hand to each other: small frozen values that name an artifact and its digest."""

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, Field


class Ref(BaseModel):
    """An artifact and the digest of its content, which is all that a cache key takes from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str = Field(description="sha256 of the content; md5 where DVC gives it.")


class DataVersion(Ref):
    """A data set in the working tree, as DVC pins it."""

    path: str = Field(description="Folder of the data set, relative to the project.")
    rev: str = Field(description="The .dir hash of data.dvc.")
    files: dict[str, str] = Field(description="md5 of each file of the data set.")
    dirty: bool = Field(False, description="The files differ from data.dvc, and that was allowed.")


class DataRef(Ref):
    """One parquet file of validated rows."""

    uri: str
    rows: int


class SplitRef(BaseModel):
    """The two splits of a table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: DataRef
    test: DataRef


class FileDigest(BaseModel):
    """The content of a file, in short."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    size: int = Field(description="In bytes.")


class StepResult(Ref):
    """What every step returns: an artifact, where it was made, and the numbers it was judged by."""

    uri: str = Field(description="Where the artifact is; empty where the step makes none.")
    mlflow_run_id: str = Field(description="The step's run that made it.")
    metrics: dict[str, float] = Field(default_factory=dict, description="Final metrics.")
    figures: dict[str, str] = Field(
        default_factory=dict, description="URIs of the step's figures and tables, by file name."
    )
    figure_digests: dict[str, FileDigest] = Field(
        default_factory=dict, description="Their contents, by the same names."
    )
    seconds: float = Field(0.0, description="Wall time of making it.")


class PreparedData(StepResult):
    """The validated tables of a data set."""

    demonstrations: SplitRef
    preferences: SplitRef
    prompts: SplitRef
    ratings: SplitRef | None = None


class ModelRef(StepResult):
    """A model with its tokenizer, logged to MLflow; the uri is the folder that holds both."""

    mlflow_model_id: str


class EvaluationRef(StepResult):
    """The comparison of two models."""


class RegistrationRef(StepResult):
    """A version of a registered model."""

    name: str
    version: str


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path, parts: tuple[str, ...] = ("",)) -> str:
    """sha256 over the names and the contents of the files in some parts of a folder."""
    files = (path for part in parts for path in (folder / part).rglob("*") if path.is_file())
    return listing_digest(
        {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    )


def listing_digest(files: Mapping[str, str]) -> str:
    """sha256 over the names and the contents of files: relative paths to the sha256 of each."""
    names = sorted(files, key=PurePosixPath)
    listing = "".join(f"{files[name]}  {name}\n" for name in names)
    return hashlib.sha256(listing.encode()).hexdigest()
