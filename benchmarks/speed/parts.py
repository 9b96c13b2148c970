"""What is measured: parts, their sides, and how much each does."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.speed.worker import Spec

Size = Literal["full", "quick"]
Python = Literal["own", "trl-1.12", "trl-newest"]

WORKS = {
    "a": "a Llama of 4.5M parameters",
    "b": "SmolLM2-135M",
}


@dataclass(frozen=True)
class Side:
    """One way to do the work of a part."""

    name: str
    module: str
    spec: Spec
    python: Python = "own"
    turns: int | None = None
    """Where fewer than the part's are enough."""


@dataclass(frozen=True)
class Part:
    """Sides that are measured in turns, A/B/A/B."""

    name: str
    title: str
    kind: Literal["ppo", "supervised", "utilisation", "vocabulary", "linearity", "data", "rerun"]
    turns: int
    minutes: float
    """Expected on two cores."""
    sides: tuple[Side, ...] = ()
    work: Literal["a", "b"] | None = None
    """Whose models and rows it needs."""
    judged: Spec | None = field(default=None)
    """How the policies that it trains are judged afterwards."""


PREPARED: Mapping[str, Mapping[Size, Spec]] = {
    "a": {
        "full": {
            "sft_rows": 1000, "sft_epochs": 6, "sft_learning_rate": 2e-3,
            "reward_rows": 1000, "reward_learning_rate": 3e-4,
        },
        "quick": {
            "sft_rows": 64, "sft_epochs": 1, "sft_learning_rate": 2e-3,
            "reward_rows": 32, "reward_learning_rate": 3e-4,
        },
    },
    "b": {
        "full": {
            "sft_rows": 480, "sft_epochs": 1, "sft_learning_rate": 5e-5,
            "reward_rows": 320, "reward_learning_rate": 3e-5,
        },
        "quick": {
            "sft_rows": 16, "sft_epochs": 1, "sft_learning_rate": 5e-5,
            "reward_rows": 16, "reward_learning_rate": 3e-5,
        },
    },
}  # fmt: skip
"""How the models of a work are made."""

# TRL's own defaults: PPOConfig of 1.12.
TRL_PPO: Spec = {"epochs": 4, "response_tokens": 53, "temperature": 0.7, "kl_coef": 0.05}
PPO: Mapping[str, Mapping[Size, Spec]] = {
    # In batches of 8, TRL's default, a model this small would wait for Python most of the time.
    "a": {
        "full": {
            "batch": 64, "mini_batch": 16, "episodes": 256, "learning_rate": 1e-4,
            "micro_batch_tokens": 2048,
        },
        "quick": {
            "batch": 8, "mini_batch": 4, "episodes": 16, "learning_rate": 1e-4,
            "micro_batch_tokens": 4096, "response_tokens": 8,
        },
    },
    # TRL's defaults as they are: batches of 8, one mini-batch, 3e-6.
    "b": {
        "full": {
            "batch": 8, "mini_batch": 8, "episodes": 24, "learning_rate": 3e-6,
            "micro_batch_tokens": 512,
        },
        "quick": {
            "batch": 2, "mini_batch": 2, "episodes": 2, "learning_rate": 3e-6,
            "micro_batch_tokens": 1024, "response_tokens": 4, "epochs": 1,
        },
    },
}  # fmt: skip
JUDGED: Mapping[str, Mapping[Size, int]] = {
    "a": {"full": 160, "quick": 8},
    "b": {"full": 64, "quick": 2},
}
"""Prompts that policies are compared on."""

SUPERVISED: Mapping[str, Mapping[Size, Spec]] = {
    "a": {
        "full": {"sft_rows": 700, "reward_rows": 350, "batch": 32},
        "quick": {"sft_rows": 16, "reward_rows": 8, "batch": 8},
    },
    "b": {
        "full": {"sft_rows": 160, "reward_rows": 96, "batch": 16},
        "quick": {"sft_rows": 4, "reward_rows": 4, "batch": 4},
    },
}
LEARNING_RATES = {"sft": 2e-5, "reward": 1e-4}
"""TRL's defaults."""
MICRO_BATCH_TOKENS = {"a": 4096, "b": 2048}
PACKED_TOKENS = 512

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
"""Of the models whose vocabulary grows."""
VOCABULARIES: Mapping[Size, tuple[int, ...]] = {
    "full": (4096, 16_384, 49_152, 150_000),
    "quick": (512, 4096),
}


def all_parts(size: Size, works: Path) -> dict[str, Part]:
    """The parts by their names; `works` holds the folders of prepared models, a and b."""
    parts = [
        *(_ppo(work, size, works) for work in ("a", "b")),
        *(_supervised("sft", work, size, works) for work in ("a", "b")),
        *(_supervised("reward", work, size, works) for work in ("a", "b")),
        _utilisation(size, works),
        _vocabulary(size),
        _linearity(size, works),
        Part("data", "A million preference pairs", "data", turns=1, minutes=7),
        Part("rerun", "A run with nothing to do, against `dvc repro`", "rerun", turns=1, minutes=4),
    ]  # fmt: skip
    return {part.name: part for part in parts}


def prepared_spec(work: str, size: Size, data: Path, works: Path) -> Spec:
    """The spec that `ours.prepare` makes a work from."""
    return {"kind": work, "data": str(data), "out": str(works / work), **PREPARED[work][size]}


def _model(work: str, works: Path) -> Spec:
    return {"folder": str(works / work)}


def _ppo(work: Literal["a", "b"], size: Size, works: Path) -> Part:
    shared = {"model": _model(work, works), **TRL_PPO, **PPO[work][size]}

    def trl(name: str, bf16: str, turns: int | None = None) -> Side:
        return Side(name, "peers.ppo", shared | {"bf16": bf16}, "trl-1.12", turns)

    return Part(
        f"ppo-{work}",
        f"PPO, {WORKS[work]}",
        "ppo",
        turns=_turns(size, 3 if work == "a" else 2),
        minutes=10 if work == "a" else 13,
        sides=(
            Side("plumbline", "ours.ppo", shared | {"precision": "auto"}),
            trl("TRL, its defaults", "no"),
            trl("TRL, bf16 autocast", "autocast"),
            trl("TRL, bf16 weights", "weights", 1),
        ),
        work=work,
        judged={
            "model": _model(work, works),
            "prompts": JUDGED[work][size],
            "response_tokens": shared["response_tokens"],
            "temperature": shared["temperature"],
        },
    )


def _supervised(
    kind: Literal["sft", "reward"], work: Literal["a", "b"], size: Size, works: Path
) -> Part:
    sizes = SUPERVISED[work][size]
    shared = {
        "kind": kind,
        "model": _model(work, works),
        "rows_used": sizes[f"{kind}_rows"],
        "batch": sizes["batch"],
        "learning_rate": LEARNING_RATES[kind],
    }

    def trl(setting: str) -> Side:
        spec = shared | {"setting": setting, "packed_tokens": PACKED_TOKENS}
        return Side(f"TRL, {setting}", "peers.supervised", spec, "trl-newest")

    settings = ("default", "grouped", "packed") if kind == "sft" else ("default", "grouped")
    ours = shared | {"precision": "auto", "micro_batch_tokens": MICRO_BATCH_TOKENS[work]}
    return Part(
        f"{kind}-{work}",
        f"{'SFT' if kind == 'sft' else 'Reward model'}, {WORKS[work]}",
        "supervised",
        turns=_turns(size, 3 if work == "a" else 2),
        minutes=4 if work == "a" else 6,
        sides=(Side("plumbline", "ours.supervised", ours), *map(trl, settings)),
        work=work,
    )


def _utilisation(size: Size, works: Path) -> Part:
    shared = {
        **TRL_PPO, **PPO["b"][size], "model": _model("b", works), "epochs": 1,
        "episodes": 32 if size == "full" else 4, "batch": 32 if size == "full" else 4,
        "mini_batch": 16 if size == "full" else 2, "micro_batch_tokens": 2048,
    }  # fmt: skip
    sides = (Side(name, "ours.utilisation", shared | {"precision": name}) for name in _WIDTHS)
    return Part(
        "update", f"The update of PPO, {WORKS['b']}", "utilisation", turns=_turns(size, 2),
        minutes=6, sides=tuple(sides), work="b",
    )  # fmt: skip


def _vocabulary(size: Size) -> Part:
    shared = {
        **TRL_PPO, **PPO["a"][size], "epochs": 1, "micro_batch_tokens": 4096,
        "episodes": 32, "batch": 32, "mini_batch": 32,
        "response_tokens": 64 if size == "full" else 8,
    }  # fmt: skip
    sides = (
        Side(
            f"{precision}, {vocabulary}",
            "ours.vocabulary",
            shared
            | {
                "precision": precision,
                "model": {"shape": SHAPE | {"vocab_size": vocabulary}},
            },
        )
        for precision in _WIDTHS
        for vocabulary in VOCABULARIES[size]
    )
    return Part(
        "vocabulary", "Memory of the update as the vocabulary grows", "vocabulary", turns=1,
        minutes=4, sides=tuple(sides),
    )  # fmt: skip


_WIDTHS = ("fp32", "bf16")


def _linearity(size: Size, works: Path) -> Part:
    full = size == "full"
    shared = {
        "model": _model("a", works), **TRL_PPO, **PPO["a"][size], "precision": "auto",
    }  # fmt: skip
    batch = shared["batch"]
    sizes = {
        "episodes": [batch * n for n in ((1, 2, 3, 4, 6, 8) if full else (1, 2, 3))],
        "tokens": [32, 64, 96, 128, 192, 256] if full else [8, 16, 24],
        "sft": [100, 200, 300, 400, 600, 800] if full else [8, 16, 24],
    }
    sides = (
        Side(
            series,
            "ours.linearity",
            shared | {"series": series, "sizes": sizes[series], "episodes": batch},
        )
        for series in sizes
    )
    return Part(
        "linearity", "Time against episodes and tokens", "linearity", turns=_turns(size, 2),
        minutes=7, sides=tuple(sides), work="a",
    )  # fmt: skip


def _turns(size: Size, turns: int) -> int:
    return turns if size == "full" else 1
