"""Names of runs, from what was set: quickstart-kl0.1-seed3."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LONGEST = 80
SHORT = {
    "alignment.method": "",
    "rl.algorithm": "",
    "rl.kl_coef": "kl",
    "rl.learning_rate": "lr",
    "rl.episodes": "episodes",
    "rl.epochs": "epochs",
    "rl.entropy_coef": "entropy",
    "dpo.beta": "beta",
    "sft.learning_rate": "sft.lr",
    "reward_model.learning_rate": "rm.lr",
    "reward_model.epochs": "rm.epochs",
    "sampling.temperature": "t",
    "sampling.response_tokens": "tokens",
}
"""What stands for a key in a name, where that is not the key itself."""


def run_name(experiment: str, overrides: Mapping[str, object]) -> str:
    """The name of a run of an experiment with some of its params changed.

    Args:
        experiment: its name, or its file.
        overrides: the changed params by their dotted keys.
    """
    changes = [f"{SHORT.get(key, key)}{_written(value)}" for key, value in overrides.items()]
    name = "-".join([Path(experiment).stem, *changes])
    return re.sub(r"[^\w.+-]+", "_", name)[:LONGEST]


def _written(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def flow_run_name() -> str:
    """The name of the flow run that starts in this context, by its parameters."""
    from prefect import runtime

    given = runtime.flow_run.parameters
    return name_of(given, given.get("overrides") or ())


def name_of(given: Mapping[str, Any], overrides: Iterable[str]) -> str:
    """The name of a flow run of an experiment.

    Args:
        given: the flow run's parameters.
        overrides: what they change of the experiment, as KEY=VALUE.
    """
    pairs = (text.partition("=") for text in overrides)
    experiment = given.get("experiment", "quickstart")
    return run_name(experiment, {key: value for key, _, value in pairs})


def sweep_run_name() -> str:
    """The name of the sweep's flow run that starts in this context, by its parameters."""
    from prefect import runtime

    given = runtime.flow_run.parameters
    pairs = (text.partition("=") for text in given.get("overrides") or ())
    changed = {key.strip().removeprefix("sweep."): value for key, _, value in pairs}
    if given.get("parallel") is not None:
        changed["parallel"] = given["parallel"]
    return run_name(str(given.get("sweep") or given.get("name")), changed)
