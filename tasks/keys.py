"""Cache keys: what a step's result depends on, and the digest of it.

Imports neither Prefect nor MLflow nor torch, so that a plan needs none of them.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from plumbline.errors import ParamsError
from plumbline.functions import split_name
from plumbline.params.loader import flatten
from plumbline.params.schema import Params, StepName
from plumbline.project import find_project
from plumbline.refs import DataVersion, Ref, SplitRef

SECTIONS: dict[StepName, str] = {
    "prepare_data": "data",
    "base_model": "model",
    "judge": "reward_model",
    "register": "registry",
}
"""The params section of a step, where it is not called like the step."""


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
    """Input artifacts to their digests; None where the input is pending."""
    code: dict[str, str]
    """Modules that the step can reach to the sha256 of their source."""

    @property
    def complete(self) -> bool:
        """Whether every input is known."""
        return None not in self.inputs.values()


def ingredients(step: StepName, arguments: Mapping[str, Any]) -> Ingredients:
    """Sort a step's arguments into params and inputs, and add the code it reaches."""
    params: dict[str, Any] = {}
    inputs: dict[str, str | None] = {}
    code = dict(code_fingerprint(f"tasks.{step}"))
    for name, value in arguments.items():
        match value:
            case Pending():
                inputs[name] = None
            case DataVersion():
                inputs |= {f"{name}/{file}": md5 for file, md5 in value.files.items()}
            case SplitRef():
                inputs |= {f"{name}/train": value.train.digest, f"{name}/test": value.test.digest}
            case Ref():
                inputs[name] = value.digest
            case BaseModel():
                # A step's own section under the name that the user knows it by.
                section = SECTIONS.get(step, step)
                params |= flatten(value, section if name == "params" else name)
                if isinstance(value, Params):
                    for function in value.functions():
                        code |= function_fingerprint(function)
            case _:
                params[name] = value
    return Ingredients(params, inputs, code)


def cache_key(step: StepName, parts: Ingredients) -> str:
    """The name of a step's result: the step, then the sha256 of what it depends on."""
    text = json.dumps(parts._asdict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{step}-{hashlib.sha256(text.encode()).hexdigest()[:40]}"


@cache
def code_fingerprint(module: str) -> dict[str, str]:
    """The source digest of each module in the import closure of `module`, inside the project.

    Packages above a module count too, since importing it runs them.
    """
    reached = {module, *_import_graph().find_upstream_modules(module)}
    for name in tuple(reached):
        while "." in name:
            name = name.rpartition(".")[0]
            reached.add(name)
    return {name: _source_digest(name) for name in sorted(reached)}


def function_fingerprint(function: str) -> dict[str, str]:
    """The code of a function that the params name; outside the project, of its module alone."""
    module, _ = split_name(function)
    try:
        found = find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise ParamsError(f"{function}: expected a function of a module that can be imported")
    if module.partition(".")[0] in ("tasks", "plumbline"):
        return code_fingerprint(module)
    return {module: _source_digest(module)}


@cache
def _import_graph() -> Any:
    import grimp

    folder = find_project().home / "imports"
    return grimp.build_graph("tasks", "plumbline", cache_dir=str(folder))


@cache
def _source_digest(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"no source for {module}: expected a Python file")
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
