"""Reading the results of finished steps, and what each was made of, without starting anything."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

from plumbline.params.schema import StepName
from plumbline.refs import (
    EvaluationRef,
    ModelRef,
    PreparedData,
    RegistrationRef,
    StepResult,
    file_digest,
    folder_digest,
)
from tasks.keys import Ingredients

RESULT_TYPES: dict[StepName, type[StepResult]] = {
    "prepare_data": PreparedData,
    "base_model": ModelRef,
    "sft": ModelRef,
    "reward_model": ModelRef,
    "judge": ModelRef,
    "rl": ModelRef,
    "dpo": ModelRef,
    "evaluate": EvaluationRef,
    "register": RegistrationRef,
}

SERIALIZER = {
    "type": "json",
    "jsonlib": "json",
    "object_encoder": "prefect.serializers.prefect_json_object_encoder",
    "object_decoder": "prefect.serializers.prefect_json_object_decoder",
    "dumps_kwargs": {},
    "loads_kwargs": {},
}
"""What Prefect notes of its JSON serializer in each record."""

MODEL_PARTS = ("model", "adapter", "components")
"""Folders of a logged model that are its content; beside them stand run ids and times."""


class Record(NamedTuple):
    """A finished step: its key, what it depended on, and when it was made."""

    key: str
    ingredients: Ingredients
    made: float


def read_result(results: Path, step: StepName, key: str) -> StepResult | None:
    """The result stored under a key, or None where there is none that can be read.

    Only JSON is read; a record that asks for another serializer, decoder or class is no result,
    since Prefect would import and call what it names.
    """
    try:
        record = json.loads((results / key).read_bytes())
        serializer = record["metadata"]["serializer"]
        if any(serializer.get(name, value) != value for name, value in SERIALIZER.items()):
            return None
        stored = record["result"]
        stored = json.loads(stored) if isinstance(stored, str) else stored
        made = RESULT_TYPES[step]
        if stored["__class__"] != f"{made.__module__}.{made.__name__}":
            return None
        return made.model_validate(stored["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def damage(result: StepResult) -> str | None:
    """Why a result's artifacts can't be used any more; None where they are as they were made.

    Artifacts on a remote store are taken at their word.
    """
    match result:
        case PreparedData():
            tables = (result.demonstrations, result.preferences, result.prompts, result.ratings)
            refs = [ref for table in tables if table for ref in (table.train, table.test)]
            broken = next(filter(None, (_file_damage(ref.uri, ref.digest) for ref in refs)), None)
        case EvaluationRef():
            broken = _file_damage(result.uri, result.digest)
        case _:
            broken = _model_damage(result.uri, result.digest)
    return broken or next(filter(None, map(_absence, result.figures.values())), None)


def local_path(uri: str) -> Path | None:
    """The path that a URI names on this machine, or None where it is elsewhere."""
    parts = urlparse(uri)
    if parts.scheme not in ("", "file"):
        return None
    return Path(unquote(parts.path))


def write_ingredients(home: Path, key: str, parts: Ingredients) -> None:
    """Keep what a key was made of, for explanations."""
    folder = home / "ingredients"
    folder.mkdir(exist_ok=True)
    aside = folder / f".{key}.{os.getpid()}"
    aside.write_text(json.dumps(parts._asdict(), sort_keys=True))
    aside.replace(folder / f"{key}.json")


def records(home: Path, step: StepName) -> list[Record]:
    """The finished runs of a step, newest first."""
    return sorted(_records(home, step), key=lambda record: record.made, reverse=True)


def _records(home: Path, step: StepName) -> Iterator[Record]:
    for path in (home / "ingredients").glob(f"{step}-*.json"):
        result = home / "results" / path.stem
        try:
            parts: dict[str, Any] = json.loads(path.read_bytes())
            yield Record(path.stem, Ingredients(**parts), result.stat().st_mtime)
        except (OSError, ValueError, TypeError):
            continue


def _file_damage(uri: str, digest: str) -> str | None:
    path = local_path(uri)
    if path is None or not path.is_file():
        return _absence(uri)
    return None if file_digest(path) == digest else f"{path} does not match its digest"


def _model_damage(uri: str, digest: str) -> str | None:
    folder = local_path(uri)
    if folder is None or not folder.is_dir():
        return _absence(uri)
    if folder_digest(folder, MODEL_PARTS) != digest:
        return f"{folder} does not match its digest"
    return None


def _absence(uri: str) -> str | None:
    path = local_path(uri)
    return None if path is None or path.exists() else f"{path} is gone"
