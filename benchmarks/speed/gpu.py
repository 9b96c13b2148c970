"""The same tables on a machine with a GPU: SmolLM2-135M's shape, and a Llama of 1B parameters.

    python -m benchmarks.speed.gpu                        # from the repository's root
    python -m benchmarks.speed.gpu ppo-135m update-135m   # some parts, each a few minutes
    python -m benchmarks.speed.gpu --quick                # in small

It needs PyTorch with CUDA, transformers, accelerate, peft and psutil, and nothing that has to be
fetched: weights and prompts are random, so that every response has its full length. Sides of TRL
are measured where `trl` can be imported: PPO with 1.12, the others with any. Writes a table and a
JSON file to --out.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.speed.machine import ROOT, describe
from benchmarks.speed.parts import TRL_PPO, Part, Side
from benchmarks.speed.process import ProcessError, own_python, run_worker
from benchmarks.speed.report import machine_line, part_tables
from benchmarks.speed.store import Measurement, Store, write_text
from benchmarks.speed.worker import Spec

TOKENS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 2048}
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True, **TOKENS,
    },
    "1b": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True, **TOKENS,
    },
}  # fmt: skip
NAMES = {"135m": "SmolLM2-135M's shape", "1b": "a Llama of 1.2B parameters"}
BATCHES: dict[str, Spec] = {
    "135m": {"batch": 64, "mini_batch": 16, "episodes": 128, "rows": 512},
    "1b": {"batch": 32, "mini_batch": 8, "episodes": 64, "rows": 128},
}
SETTINGS = {"sft": ("default", "grouped", "packed"), "reward": ("default", "grouped")}
"""Of TRL's trainers."""
QUICK: Spec = {"batch": 4, "mini_batch": 2, "episodes": 4, "rows": 8}
LEARNING_RATE = 1e-6
MICRO_BATCH = 16_384
"""Tokens."""


def gpu_parts(*, quick: bool, trl: str | None) -> dict[str, Part]:
    """The parts by their names; `trl` is the installed version, if any."""
    parts = [part for name in SHAPES for part in _parts_of(name, quick=quick, trl=trl)]
    return {part.name: part for part in parts}


def _parts_of(name: str, *, quick: bool, trl: str | None) -> Iterator[Part]:
    sizes = QUICK if quick else BATCHES[name]
    turns = 1 if quick else 3
    # The shape is made smaller, too, where only the script itself is tried.
    shape = SHAPES[name] | ({"num_hidden_layers": 2, "vocab_size": 2048} if quick else {})
    model = {
        "shape": shape, "rows": sizes["rows"],
        "prompt": [16, 64 if quick else 256], "response": [16, 32 if quick else 128],
    }  # fmt: skip
    shared: Spec = {
        **TRL_PPO, **sizes, "model": model, "precision": "auto", "learning_rate": LEARNING_RATE,
        "micro_batch_tokens": MICRO_BATCH,
    }  # fmt: skip
    has_ppo = trl is not None and tuple(map(int, trl.split(".")[:2])) <= (1, 12)
    peers = [("TRL, its defaults", "no"), ("TRL, bf16 autocast", "autocast")] if has_ppo else []
    yield Part(
        f"ppo-{name}", f"PPO, {NAMES[name]}", "ppo", turns, 4,
        (
            Side("plumbline", "ours.ppo", shared),
            *(Side(side, "peers.ppo", shared | {"bf16": bf16}) for side, bf16 in peers),
        ),
    )  # fmt: skip
    for kind, settings in SETTINGS.items():
        spec = shared | {"kind": kind, "rows_used": sizes["rows"], "packed_tokens": 2048}
        yield Part(
            f"{kind}-{name}", f"{'SFT' if kind == 'sft' else 'Reward model'}, {NAMES[name]}",
            "supervised", turns, 3,
            (
                Side("plumbline", "ours.supervised", spec),
                *(
                    Side(f"TRL, {setting}", "peers.supervised", spec | {"setting": setting})
                    for setting in (settings if trl else ())
                ),
            ),
        )  # fmt: skip
    update = shared | {"epochs": 1, "episodes": sizes["batch"]}
    yield Part(
        f"update-{name}", f"The update of PPO, {NAMES[name]}", "utilisation", turns, 2,
        (Side("bf16", "ours.utilisation", update | {"precision": "bf16"}),),
    )  # fmt: skip


def main() -> int:
    """Parse the command line, measure, write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    trl = version("trl") if find_spec("trl") else None
    names = [*gpu_parts(quick=False, trl=trl)]
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="in small, on a CPU, too")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / ".speed" / "gpu")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(names):
        parser.error(f"no part {', '.join(sorted(unknown))}: expected {', '.join(names)}")
    gpu = _gpu()
    if gpu is None and not options.quick:
        print(
            "Expected a GPU that PyTorch can use through CUDA, found none. `make bench` measures "
            "on the CPU; --quick tries this script without a GPU.",
            file=sys.stderr,
        )
        return 1
    machine = describe()
    machine["cpu"] = f"{gpu or 'no GPU'}, {machine['cpu']}"
    store = Store(options.out / "gpu.json", machine)
    parts = gpu_parts(quick=options.quick, trl=trl)
    chosen = [parts[name] for name in options.parts or names]
    failed = False
    for part in chosen:
        try:
            _measure(part, store)
        except ProcessError as error:
            print(f"{part.name} failed: {error}", file=sys.stderr)
            failed = True
    text = f"{machine_line(store)}\n\n{part_tables(store, [*parts.values()])}\n"
    write_text(options.out / "gpu.md", text)
    print(text)
    if trl is None:
        print("TRL is not installed here, so that none of its sides was measured.", file=sys.stderr)
    return int(failed)


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _measure(part: Part, store: Store) -> None:
    # What can't be installed may have been put beside.
    beside = os.environ.get("PYTHONPATH", "")
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), beside])}
    for turn in range(part.turns):
        for side in part.sides:
            print(f"{part.name}: {side.name}, turn {turn + 1} of {part.turns}", file=sys.stderr)
            spec = side.spec | {"seed": turn}
            measured = run_worker(own_python(), side.module, spec, paths, ours=True)
            at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
            store.add(
                Measurement(
                    part.name, side.name, turn, "", "", at, round(measured.seconds, 1),
                    round(measured.others, 3), measured.result,
                )
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
