"""The quickstart with several algorithms over several seeds, and a table of the bars it must pass.

    python benchmarks/stability.py run --seeds 0 1 2 --algorithms ppo rloo grpo --out stability
    python benchmarks/stability.py table --out stability

Each run is `plumbline run quickstart --set rl.algorithm=… --set seed=…`; those of one seed share
its SFT and its reward model through the cache. Runs whose result is in --out already are skipped.
Two processes may share --out, each with its own PLUMBLINE_HOME.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

Metrics = Mapping[str, float]


class Bar(NamedTuple):
    """One thing that a run must reach."""

    name: str
    bar: str
    value: Callable[[Metrics], float]
    reached: Callable[[float], bool]
    digits: int = 3


BARS = (
    Bar("reward-model accuracy", "≥ 0.9", lambda m: m["reward_model/accuracy"], lambda v: v >= 0.9),
    Bar("gold, SFT", "≤ 0.7", lambda m: m["eval/sft/gold"], lambda v: v <= 0.7),
    Bar("gold, policy", "≥ 0.9", lambda m: m["eval/policy/gold"], lambda v: v >= 0.9),
    Bar("win rate over SFT", "≥ 0.75", lambda m: m["eval/win_rate"], lambda v: v >= 0.75),
    Bar("its lower bound", "> 0.65", lambda m: m["eval/win_rate_low"], lambda v: v > 0.65),
    Bar("KL, nats a response", "≤ 25", lambda m: m["eval/policy/kl"], lambda v: v <= 25, 1),
    Bar(
        "distinct-2, policy / SFT", "≥ 0.7",
        lambda m: m["eval/policy/distinct_2"] / m["eval/sft/distinct_2"], lambda v: v >= 0.7, 2,
    ),
)  # fmt: skip


def run(algorithms: list[str], seeds: list[int], out: Path) -> None:
    """Make the runs that --out lacks, one after the other."""
    out.mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).with_name("plumbline")), "run", "quickstart"]
    for seed in seeds:
        for algorithm in algorithms:
            file = out / f"{algorithm}-{seed}.json"
            if file.exists():
                continue
            settings = ["--set", f"seed={seed}", "--set", f"rl.algorithm={algorithm}"]
            done = subprocess.run([*command, *settings, "--json", str(file)], capture_output=True)
            print(file.name, "done" if done.returncode == 0 else done.stderr.decode(), flush=True)


def table(out: Path) -> str:
    """Markdown: a row a run, the worst values of each algorithm, and how many reach every bar."""
    head = " | ".join(bar.name for bar in BARS)
    lines = [f"| algorithm | seed | {head} |", "|---|---:|" + "---:|" * len(BARS)]
    lines.append(f"| bar | | {' | '.join(bar.bar for bar in BARS)} |")
    runs: dict[str, list[list[float]]] = {}
    for file in sorted(out.glob("*.json"), key=_order):
        algorithm, _, seed = file.stem.partition("-")
        metrics = json.loads(file.read_bytes())["metrics"]
        values = [bar.value(metrics) for bar in BARS]
        lines.append(_row(algorithm, seed, values))
        runs.setdefault(algorithm, []).append(values)
    counts = []
    for algorithm, rows in runs.items():
        worst = [_worst(bar, [row[i] for row in rows]) for i, bar in enumerate(BARS)]
        lines.append(_row(algorithm, "worst", worst))
        reached = [all(bar.reached(row[i]) for i, bar in enumerate(BARS)) for row in rows]
        counts.append(f"{algorithm}: {sum(reached)} of {len(rows)}")
    return "\n".join([*lines, "", "All bars reached: " + ", ".join(counts) + "."])


def _row(algorithm: str, seed: str, values: list[float]) -> str:
    cells = [
        f"{value:.{bar.digits}f}" + ("" if bar.reached(value) else " ✗")
        for bar, value in zip(BARS, values, strict=True)
    ]
    return f"| {algorithm} | {seed} | {' | '.join(cells)} |"


def _worst(bar: Bar, values: list[float]) -> float:
    return max(values) if bar.bar.startswith("≤") else min(values)


def _order(file: Path) -> tuple[str, int]:
    algorithm, _, seed = file.stem.partition("-")
    return algorithm, int(seed)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--algorithms", nargs="+", default=["ppo", "rloo", "grpo"])
    parser.add_argument("--out", type=Path, default=Path("stability"))
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.algorithms, arguments.seeds, arguments.out)
    print(table(arguments.out))


if __name__ == "__main__":
    main()
