"""What every measured process shares: a spec comes in, one line of JSON goes out.

It runs in the peers' environments, too, and so imports nothing but the standard library.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Spec = dict[str, Any]
"""What a process shall do."""
Result = dict[str, Any]
"""What it has measured."""

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def serve(work: Callable[[Spec], Result]) -> None:
    """Do what the spec in the first argument says, and print the result as one line of JSON."""
    spec = json.loads(sys.argv[1])
    # Libraries print what they like, which goes to the log.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        out.write(json.dumps(work(spec)) + "\n")


def peak_mb() -> float:
    """The most memory that this process has held so far, MB.

    Not `ru_maxrss`, which begins with what the parent held as it started this process.
    """
    return _status("VmHWM")


def resident_mb() -> float:
    """The memory that this process holds, MB."""
    return _status("VmRSS")


def forget_peak() -> None:
    """Let `peak_mb` count from now on.

    Raises:
        RuntimeError: the kernel did not do it.
    """
    CLEAR.write_text("5", encoding="ascii")
    if peak_mb() > 1.05 * resident_mb() + 10:
        raise RuntimeError(f"expected {CLEAR} to reset the peak of the memory, got {peak_mb()} MB")


def _status(field: str) -> float:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024 / 1e6
    raise RuntimeError(f"expected {field} in {STATUS}, found none: a Linux kernel is needed")


class Clock:
    """Seconds of a `with` block, and when in it something ended."""

    def __init__(self) -> None:
        """It begins now."""
        self.began = time.perf_counter()
        self.seconds = 0.0
        self.laps: list[float] = []
        """Seconds of each, one after the other."""

    def lap(self) -> None:
        """One of the things that follow each other has ended."""
        self.laps.append(time.perf_counter() - self.began - sum(self.laps))


@contextmanager
def timed() -> Iterator[Clock]:
    """Measure the seconds of the block; the result is complete when it ends."""
    clock = Clock()
    yield clock
    clock.seconds = time.perf_counter() - clock.began


def episodes_of(spec: Spec, clock: Clock) -> Result:
    """How fast PPO was, from a clock with a lap for each batch.

    The first batch is a warm-up: both sides touch most of their memory for the first time then,
    which costs as much as the machine says, and a training pays once.
    """
    counted = clock.laps[1:] or clock.laps
    return {
        "episodes": spec["episodes"],
        "seconds": clock.seconds,
        "batch_seconds": clock.laps,
        "episodes_per_s": len(counted) * spec["batch"] / sum(counted),
        "episodes_per_s_from_start": spec["episodes"] / clock.seconds,
    }


def rows_of(model: Spec) -> dict[str, Any]:
    """The token ids that both sides train on.

    Those of the folder that `ours.prepare` has made, or random ones, for random weights: as many
    `rows` as the model's spec says, with `prompt` and `response` lengths between two numbers each.
    """
    if "folder" in model:
        rows: dict[str, Any] = json.loads(Path(model["folder"], "rows.json").read_bytes())
        return rows
    draw = random.Random(0)
    vocabulary = model["shape"]["vocab_size"]

    def text(kind: str) -> list[int]:
        length = draw.randint(*model[kind])
        # 0 pads and 1 ends.
        return [draw.randrange(3, vocabulary) for _ in range(length)]

    fields = ("prompt", "chosen", "rejected")
    pairs = [
        {name: text(name if name == "prompt" else "response") for name in fields}
        for _ in range(model["rows"])
    ]
    return {
        "queries": [pair["prompt"] for pair in pairs],
        "sft": [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in pairs],
        "reward": pairs,
        "end": 1,
        "pad": 0,
    }
