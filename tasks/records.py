"""Reading the results of finished steps, and what each was made of, without starting anything."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

from plumbline.artifacts import Fault, Hasher, file_fault, read_manifest
from plumbline.params.schema import StepName
from plumbline.refs import (
    EvaluationRef,
    FileDigest,
    ModelRef,
    PreparedData,
    RegistrationRef,
    StepResult,
    file_digest,
    folder_digest,
    listing_digest,
)
from tasks.keys import Cached, Ingredients

RESULT_TYPES: dict[Cached, type[StepResult]] = {
    "prepare_data": PreparedData,
    "base_model": ModelRef,
    "sft": ModelRef,
    "reward_model": ModelRef,
    "judge": ModelRef,
    "rl": ModelRef,
    "dpo": ModelRef,
    "evaluate": EvaluationRef,
    "register": RegistrationRef,
    "contest": EvaluationRef,
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

DECODED = {"__class__", "__exc_type__"}
"""Keys by which Prefect's JSON names what it shall import."""

MODEL_PARTS = ("model", "adapter", "components")
"""Folders of a logged model that are its content; beside them stand run ids and times."""

_CONTENT = tuple(f"{part}/" for part in MODEL_PARTS)

ADAPTED = "adapted_model.json"
"""File beside an adapter that says where the model is that it changes, and its digest."""


class Record(NamedTuple):
    """A finished step: its key, what it depended on, and when it was made."""

    key: str
    ingredients: Ingredients
    made: float


def read_result(results: Path, step: Cached, key: str) -> StepResult | None:
    """The result stored under a key, or None where there is none that can be read.

    Only JSON is read; a record that asks for another serializer, decoder or class is no result,
    since Prefect would import and call what it names.
    """
    try:
        record = json.loads((results / key).read_bytes())
        serializer = record["metadata"]["serializer"]
        if serializer.get("type") != "json" or any(
            serializer.get(name, value) != value for name, value in SERIALIZER.items()
        ):
            return None
        stored = record["result"]
        stored = json.loads(stored) if isinstance(stored, str) else stored
        made = RESULT_TYPES[step]
        named = f"{made.__module__}.{made.__name__}"
        if stored["__class__"] != named or _names_code(stored["data"]):
            return None
        return made.model_validate(stored["data"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _names_code(value: Any) -> bool:
    """Whether Prefect's decoder would import something for a part of this value."""
    if isinstance(value, dict):
        return bool(value.keys() & DECODED) or any(map(_names_code, value.values()))
    return isinstance(value, list) and any(map(_names_code, value))


def damage(result: StepResult, hasher: Hasher = file_digest) -> str | None:
    """Why a result's artifacts can't be used any more; None where they are as they were made."""
    found = faults(result, hasher)
    if not found:
        return None
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{found[0]}{more}"


def faults(result: StepResult, hasher: Hasher = file_digest) -> list[Fault]:
    """All that is wrong with a result's artifacts, its figures and tables included.

    Artifacts on a remote store are taken at their word.

    Args:
        result: of a step.
        hasher: gives the sha256 of a file, `DigestCache` where hashing everything would be slow.
    """
    found = [file_fault(path, known, hasher) for path, known in _files(result).items()]
    model: list[Fault] = []
    if not isinstance(result, PreparedData | EvaluationRef):
        folder = local_path(result.uri)
        model = model_faults(folder, result.digest, hasher) if folder else []
    return [*model, *(fault for fault in found if fault)]


def content_digest(manifest: Mapping[str, FileDigest]) -> str:
    """The digest of a logged model, by its manifest: `folder_digest` over `MODEL_PARTS`."""
    return listing_digest(
        {name: file.sha256 for name, file in manifest.items() if name.startswith(_CONTENT)}
    )


def model_faults(folder: Path, digest: str, hasher: Hasher = file_digest) -> list[Fault]:
    """What is wrong with a logged model of this digest, and with the one that it adapts.

    The digest decides, and the manifest says which file it is; what stands beside the content must
    be there, but MLflow's own functions may rewrite it, and leave files of theirs.
    """
    if not folder.is_dir():
        return [Fault(folder, "is gone", "a folder", "none")]
    manifest = read_manifest(folder)
    content = {name for name in manifest if name.startswith(_CONTENT)}
    if content_digest(manifest) != digest:
        got = folder_digest(folder, MODEL_PARTS)
        what = "does not match its digest"
        return [] if got == digest else [Fault(folder, what, f"sha256 {digest}", got)]
    expected: dict[str, FileDigest | None] = {
        name: file if name in content or name == ADAPTED else None
        for name, file in manifest.items()
    }
    broken = [file_fault(folder / name, file, hasher) for name, file in expected.items()]
    added = [
        Fault(path, "was added", "no such file", "one")
        for part in MODEL_PARTS
        for path in sorted((folder / part).rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in content
    ]
    return [*(fault for fault in broken if fault), *added, *_base_faults(folder, hasher)]


def adapted_model(folder: Path) -> tuple[str, str] | None:
    """URI and digest of the model that an adapter changes; None where a whole model is there."""
    try:
        stated = json.loads((folder / ADAPTED).read_bytes())
        return str(stated["uri"]), str(stated["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _base_faults(folder: Path, hasher: Hasher) -> list[Fault]:
    """What is wrong with the model under an adapter, without which that is nothing."""
    base = adapted_model(folder)
    path = local_path(base[0]) if base else None
    return model_faults(path, base[1], hasher) if base and path else []


def step_of(key: str) -> Cached | None:
    """The step that a cache key belongs to; None where it is none."""
    return next((step for step in RESULT_TYPES if key.startswith(f"{step}-")), None)


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


def _files(result: StepResult) -> dict[Path, FileDigest | str | None]:
    """The files on this machine that a result names, a model's own aside, and what they must be."""
    files: dict[Path, FileDigest | str | None] = {
        path: result.figure_digests.get(name)
        for name, uri in result.figures.items()
        if (path := local_path(uri))
    }
    if isinstance(result, PreparedData) and (folder := local_path(result.uri)):
        files |= {folder / name: file for name, file in read_manifest(folder).items()}
    for uri, digest in _pinned(result):
        path = local_path(uri)
        if path is not None:
            known = files.get(path)
            exact = isinstance(known, FileDigest) and known.sha256 == digest
            files[path] = known if exact else digest
    return files


def _pinned(result: StepResult) -> Iterator[tuple[str, str]]:
    """URIs of files to the digests that later steps are keyed by."""
    if isinstance(result, PreparedData):
        for table in (result.demonstrations, result.preferences, result.prompts, result.ratings):
            if table is not None:
                yield from ((ref.uri, ref.digest) for ref in (table.train, table.test))
