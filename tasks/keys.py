"""Cache keys: what a step's result depends on, and the digest of it.

Imports neither Prefect nor MLflow nor torch, so that a plan needs none of them.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from plumbline.artifacts import DigestCache
from plumbline.errors import ParamsError
from plumbline.models.gguf import gguf_path
from plumbline.params.loader import flatten
from plumbline.params.schema import GGUFModel, LocalModel, Params, StepName
from plumbline.project import Project, find_project
from plumbline.refs import DataVersion, Ref, SplitRef
from tasks.sources import code_fingerprint, function_fingerprint

Cached = StepName | Literal["contest"]
"""What has a cache key: the steps of an experiment, and the contest of two registered versions."""

SECTIONS: dict[Cached, str] = {
    "prepare_data": "data",
    "base_model": "model",
    "judge": "reward_model",
    "register": "registry",
    "contest": "evaluate",
}
"""The params section of a step, where it is not called like the step."""

NOT_READ: dict[Cached, tuple[str, ...]] = {
    # The flow points the alias, also where the step comes from the cache.
    "register": ("registry.alias",),
}
"""Params of its section that a step does not read."""


class Pending(NamedTuple):
    """Stands for an input that its own step has not made yet."""

    step: str

    def __getattr__(self, name: str) -> "Pending":
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class Ingredients(NamedTuple):
    """All that a step's result depends on, each a mapping of names to values."""

    params: dict[str, Any]
    """Dotted params to their values."""
    inputs: dict[str, str | None]
    """Input artifacts and files to their digests; None where the input is pending."""
    code: dict[str, str]
    """Modules that the step can reach to the sha256 of their source; libraries to versions."""

    @property
    def complete(self) -> bool:
        """Whether every input is known."""
        return None not in self.inputs.values()


def ingredients(step: Cached, arguments: Mapping[str, Any]) -> Ingredients:
    """Sort a step's arguments into params and inputs, and add the code it reaches.

    Raises:
        ParamsError: a function or a model that the params name is not there.
    """
    params: dict[str, Any] = {}
    inputs: dict[str, str | None] = {}
    code = dict(code_fingerprint(f"tasks.{step}"))
    for name, value in arguments.items():
        match value:
            case Pending():
                inputs[name] = None
            case DataVersion():
                inputs |= {f"{value.path}/{file}": md5 for file, md5 in value.files.items()}
            case SplitRef():
                inputs |= {f"{name}/train": value.train.digest, f"{name}/test": value.test.digest}
            case Ref():
                inputs[name] = value.digest
            case BaseModel():
                # A step's own section under the name that the user knows it by.
                section = SECTIONS.get(step, step)
                params |= flatten(value, section if name == "params" else name)
                if isinstance(value, LocalModel | GGUFModel):
                    inputs |= model_files(value, find_project(), weights=step == "base_model")
                if isinstance(value, Params):
                    for function in value.functions():
                        code |= function_fingerprint(function)
            case _:
                params[name] = value
    for name in NOT_READ.get(step, ()):
        params.pop(name, None)
    return Ingredients(params, inputs, code)


def cache_key(step: Cached, parts: Ingredients) -> str:
    """The name of a step's result: the step, then the sha256 of what it depends on."""
    text = json.dumps(parts._asdict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{step}-{hashlib.sha256(text.encode()).hexdigest()[:40]}"


def digest_cache(project: Project) -> DigestCache:
    """The digests of files that were hashed before and have not been touched since."""
    return DigestCache(project.home / "digests.json")


def model_files(
    model: LocalModel | GGUFModel, project: Project, *, weights: bool
) -> dict[str, str | None]:
    """sha256 of a local model's files, by their path as the params put it.

    Hidden files are left out, and so are the weights if they are not asked for; of a GGUF file the
    tokenizer is a part like any other.

    Raises:
        ParamsError: there is no such model.
    """
    if isinstance(model, GGUFModel):
        files = {f"{model.package or model.path}/{model.file}": gguf_path(model, project.root)}
    else:
        folder = project.root / model.path
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        files = {f"{model.path}/{name}": folder / name for name in names if _is_read(name, weights)}
        if not files:
            raise ParamsError(
                "model.path: expected a folder with config.json, model.safetensors and the "
                f"tokenizer's files, as save_pretrained writes them; got {folder} without any"
            )
    digest = digest_cache(project)
    digests = {name: digest(path) for name, path in files.items() if path.is_file()}
    digest.save()
    return dict(digests)


def _is_read(name: str, weights: bool) -> bool:
    hidden = any(part.startswith(".") for part in Path(name).parts)
    return not hidden and (weights or not name.endswith(".safetensors"))
