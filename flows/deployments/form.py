"""The forms of a custom run and a sweep: which params they offer, and the overrides they stand for.

Types, ranges and meanings are the schema's own. Imports no framework.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from plumbline.errors import ParamsError, PlumblineError
from plumbline.params.fields import catalogue
from plumbline.params.loader import flatten, is_sweep
from plumbline.params.schema import Experiment
from plumbline.params.sweep import SweepParams
from plumbline.project import find_project

KNOBS = (
    "seed",
    "precision",
    "sampling.response_tokens",
    "sampling.temperature",
    "sft.epochs",
    "sft.learning_rate",
    "reward_model.epochs",
    "reward_model.learning_rate",
    "alignment.method",
    "rl.algorithm",
    "rl.episodes",
    "rl.epochs",
    "rl.learning_rate",
    "rl.kl_coef",
    "rl.entropy_coef",
    "dpo.beta",
    "evaluate.max_prompts",
    "evaluate.best_of_n",
)
"""The params that the form has a field for, by their dotted keys; overrides take all others."""

KEPT = ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
"""What the form takes of a field's schema. Not its default: empty means as the experiment says."""


def experiment_schema() -> dict[str, Any]:
    """JSON schema of the choice of an experiment: what is in params/ now, but sweeps."""
    return _choice(sweeps=False)


def sweep_schema() -> dict[str, Any]:
    """JSON schema of the choice of a sweep: what is in params/ now."""
    return _choice(sweeps=True)


def parallel_schema() -> dict[str, Any]:
    """JSON schema of how many points run at a time; left empty, as the sweep says."""
    field = SweepParams.model_json_schema()["properties"]["parallel"]
    return {word: field[word] for word in KEPT if word in field}


def _choice(*, sweeps: bool) -> dict[str, Any]:
    try:
        folder = find_project().params
    except PlumblineError:
        return {"type": "string"}
    files = (path for path in folder.glob("*.yaml") if not path.name.startswith("_"))
    names = sorted(path.stem for path in files if is_sweep(path) is sweeps)
    return {"type": "string", "enum": names} if names else {"type": "string"}


def knobs_schema() -> dict[str, Any]:
    """JSON schema of the form's params, in the sections in which a file has them."""
    whole = Experiment.model_json_schema()
    form = _section({})
    for key in KNOBS:
        *path, name = key.split(".")
        section, found = form, whole
        for part in path:
            field = found["properties"][part]
            found = whole["$defs"][field["$ref"].rpartition("/")[2]]
            section = section["properties"].setdefault(part, _section(field) | {"title": part})
        field = found["properties"][name]
        kept = {word: field[word] for word in KEPT if word in field}
        section["properties"][name] = {"title": name, "description": _meaning(key), **kept}
    return form


def _meaning(key: str) -> str:
    """What a field means, and the values that it takes: the form shows no bounds by itself."""
    field = catalogue().field(key)
    assert field is not None
    return f"{field.description} Takes {field.expected}."


def _section(field: Mapping[str, Any]) -> dict[str, Any]:
    meaning = {"description": field["description"]} if "description" in field else {}
    return {"type": "object", **meaning, "properties": {}, "additionalProperties": False}


def overrides_schema() -> dict[str, Any]:
    """JSON schema of the free overrides."""
    item = {"type": "string", "pattern": r"^[A-Za-z_][\w.]*=", "title": "KEY=VALUE"}
    return {"type": "array", "items": item}


def as_overrides(params: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """What the form says, as the overrides of the command line.

    Args:
        params: what was filled in, in sections; None means not filled in.
        overrides: further ones, as KEY=VALUE.

    Raises:
        ParamsError: a param is set in both.
    """
    filled = [f"{k}={_written(v)}" for k, v in flatten(params).items() if v is not None]
    by_key = {text.partition("=")[0]: text for text in filled}
    for override in overrides:
        if (key := override.partition("=")[0].strip()) in by_key:
            raise ParamsError(
                f"{key} is set twice, in params ({by_key[key]}) and in overrides ({override}); "
                "leave one of them out"
            )
    return [*filled, *overrides]


def _written(value: object) -> str:
    """A value as YAML reads it back."""
    plain = isinstance(value, str) and value.isidentifier()
    return str(value) if plain else json.dumps(value, ensure_ascii=False)
