"""What the pipeline costs beside the work: `plan` and `run` with nothing to do, and a cold run.

    python benchmarks/orchestration.py                    # all three, on the quickstart: minutes
    python benchmarks/orchestration.py plan run --small   # the first two, on a small run: a minute
    python benchmarks/orchestration.py sweep              # a sweep of four points: many minutes

A fresh copy of the project runs the experiment once, with nothing cached and no database. Then

plan   `plumbline plan` is timed against a no-op `dvc repro` over as many trivial stages, each
       the input of the next, in a repository of its own: one after the other, in turns.
run    `plumbline run` with nothing to do, in the same turns.
cold   the wall time of that first command, from start to exit, less the time inside the functions
       that train and sample (TIMED), but not the time in which these log metrics (LOGGING).
       Both are measured in the command's own process.
sweep  the wall time of a cold `plumbline sweep`, less that of the steps it can't do without: SFT
       and reward model once, and of each point what is its own (rl, evaluate, register). On
       request alone.

Prints a table of medians; exits with 1 if a bar is missed.
"""

import argparse
import atexit
import importlib.abc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

began = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

TIMED = {
    "plumbline.training.sft": ("train_sft", "held_out_loss"),
    "plumbline.training.reward_model": ("train_reward_model", "normalise_on"),
    "plumbline.evaluation.reward_model": ("measure_reward_model",),
    "plumbline.training.rl": ("train_rl",),
    "plumbline.training.dpo": ("train_dpo", "pair_logprobs", "held_out_metrics"),
    "plumbline.evaluation.compare": ("answer", "answer_repeatedly"),
}
"""Functions in which models are trained, sampled and applied."""
LOGGING = {"tasks.tracking": ("StepRun.log",)}
"""What these functions call that is no training."""

REST: dict[str, tuple[str, ...]] = {
    "flows.alignment.command": ("pinned_data", "_preflight"),
    "flows.alignment.closing": ("show_summary",),
    "flows.services.prefect_server": ("join_server", "wait_for_server"),
    "flows.alignment.flow": (),
    "flows.alignment.reports": ("write_report",),
    "tasks.model_store": ("log_model",),
    "tasks.registry": ("register_model",),
    "tasks.pictures": ("publish_image",),
    "tasks.tracking": ("start_pipeline",),
}
"""Parts of what is left, for whoever wants to make it less; modules are timed until imported."""

SMALL = (
    "sft.epochs=1", "reward_model.epochs=1", "rl.episodes=128", "rl.epochs=1",
    "evaluate.max_prompts=16", "evaluate.best_of_n=1", "model.layers=1", "model.hidden_size=32",
)  # fmt: skip

BARS = {"plan": 1.0, "run": 2.0, "cold": 15.0, "sweep": 15.0}
"""plan, run: times a no-op `dvc repro`. cold, sweep: seconds."""
USUAL = ("plan", "run", "cold")
SHARED = ("sft", "reward_model", "judge")
"""Steps that a sweep pays for once."""
OWN = ("rl", "dpo", "evaluate", "register")
"""Steps that it pays for at every point."""


class Row(NamedTuple):
    """A line of the table."""

    part: str
    measured: str
    value: float
    unit: str

    @property
    def passed(self) -> bool:
        """Whether the bar is reached."""
        return self.value <= BARS[self.part]


def main() -> int:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="plan, run, cold, sweep")
    parser.add_argument("--experiment", default="quickstart")
    parser.add_argument("--sweep", default="sweep-kl")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--small", action="store_true", help="Little training: not for cold.")
    parser.add_argument("--repeats", type=int, default=11, help="Turns behind each median.")
    parser.add_argument("--json", type=Path, help="Write the rows there, too.")
    arguments = parser.parse_args()
    parts = arguments.parts or list(USUAL)
    if unknown := set(parts) - BARS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}: expected {', '.join(BARS)}")
    overrides = [*(SMALL if arguments.small else ()), *arguments.overrides]
    experiment = [arguments.experiment, *(f"--set={override}" for override in overrides)]
    with tempfile.TemporaryDirectory(prefix="orchestration-") as folder:
        rows: list[Row] = []
        if set(USUAL) & set(parts):
            project = make_project(Path(folder, "project"))
            cold = run_cold(project, experiment)
        if {"plan", "run"} & set(parts):
            count = len(planned(project))
            stages = make_stages(Path(folder, "stages"), count)
            rows += warm_rows(project, stages, experiment, parts, count, arguments.repeats)
        rows += [cold] if "cold" in parts else []
        if "sweep" in parts:
            swept = make_project(Path(folder, "swept"))
            rows.append(run_sweep(swept, [arguments.sweep, *experiment[1:]]))
    print(table(rows))
    if arguments.json:
        content = [row._asdict() | {"bar": BARS[row.part]} for row in rows]
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(row.passed for row in rows) else 1


def make_project(root: Path) -> Path:
    """A copy of the project's params and data pin, without data, results or databases."""
    root.mkdir()
    for name in ("params", ".dvc-store"):
        shutil.copytree(ROOT / name, root / name)
    (root / ".dvc").mkdir()
    for name in (".dvc/config", "data.dvc", ".gitignore"):
        shutil.copyfile(ROOT / name, root / name)
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "A copy")
    return root


def make_stages(root: Path, count: int) -> Path:
    """A DVC repository with a chain of trivial stages that have run."""
    root.mkdir()
    git(root, "init", "--quiet")
    execute(root, BIN / "dvc", "init", "--quiet")
    execute(root, BIN / "dvc", "config", "core.analytics", "false")
    (root / "out0").write_text("x\n")
    stages = "".join(
        f"  stage{i}:\n    cmd: cp out{i} out{i + 1}\n    deps: [out{i}]\n    outs: [out{i + 1}]\n"
        for i in range(count)
    )
    (root / "dvc.yaml").write_text(f"stages:\n{stages}")
    execute(root, BIN / "dvc", "repro", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "Stages")
    return root


def run_cold(project: Path, experiment: Sequence[str]) -> Row:
    """Run the experiment for the first time: the part that is no training and no sampling."""
    spent = project / "spent.json"
    seconds = execute(project, sys.executable, __file__, "timed", spent, "run", *experiment)
    execute(project, BIN / "plumbline", "plan", *experiment, "--json", "plan.json")
    if left := {name: step for name, step in planned(project).items() if step[0] != "cached"}:
        raise SystemExit(f"expected every step to be cached after a run, got {left}")
    timed = json.loads(spent.read_bytes())
    for part, functions in timed.items():
        print(f"{part}: " + ", ".join(f"{name} {value:.1f} s" for name, value in functions.items()))
    working, logging = (sum(timed[part].values()) for part in ("working", "logging"))
    text = f"{seconds:.1f} s, less {working:.1f} s of work, in which {logging:.1f} s of logging"
    return Row("cold", text, seconds - working + logging, "s")


def run_sweep(project: Path, sweep: Sequence[str]) -> Row:
    """Run a sweep for the first time: the part that is none of the steps it can't do without."""
    seconds = execute(project, BIN / "plumbline", "sweep", *sweep, "--json", "sweep.json")
    points = json.loads((project / "sweep.json").read_bytes())["points"]
    made: dict[str, list[float]] = {}
    for point in points:
        for name, step in point["steps"].items():
            if step["status"] == "ran":
                made.setdefault(name, []).append(step["seconds"])
    for name, runs in made.items():
        print(f"{name}: " + ", ".join(f"{value:.1f} s" for value in runs))
    work = sum(max(made.get(name, [0.0])) for name in SHARED)
    work += sum(sum(made.get(name, [])) for name in OWN)
    text = f"{seconds:.1f} s for {len(points)} points, less {work:.1f} s in their steps"
    return Row("sweep", text, seconds - work, "s")


def planned(project: Path) -> dict[str, tuple[str, str]]:
    """What the plan of the experiment said: action and reason of each step."""
    steps = json.loads((project / "plan.json").read_bytes())["steps"]
    return {name: (step["action"], step["because"]) for name, step in steps.items()}


def warm_rows(
    project: Path,
    stages: Path,
    experiment: Sequence[str],
    parts: Sequence[str],
    count: int,
    repeats: int,
) -> list[Row]:
    """Time the commands in turns: A, B, A, B, after one of each that does not count."""
    commands: dict[str, Callable[[], float]] = {
        "dvc repro": lambda: execute(stages, BIN / "dvc", "repro"),
        "plan": lambda: execute(project, BIN / "plumbline", "plan", *experiment),
        "run": lambda: execute(project, BIN / "plumbline", "run", *experiment),
    }
    chosen = [name for name in commands if name == "dvc repro" or name in parts]
    turns = [{name: commands[name]() for name in chosen} for _ in range(repeats + 1)][1:]
    medians = {name: statistics.median(turn[name] for turn in turns) for name in chosen}
    base = medians["dvc repro"]
    return [
        Row(
            name,
            f"{medians[name]:.3f} s, `dvc repro` of {count} stages {base:.3f} s",
            medians[name] / base,
            "×",
        )
        for name in chosen[1:]
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| | measured | value | bar | |", "|---|---|---:|---:|---|"]
    for row in rows:
        verdict = "reached" if row.passed else "**missed**"
        bar = f"≤ {BARS[row.part]:g} {row.unit}"
        lines.append(f"| {row.part} | {row.measured} | {row.value:.2f} | {bar} | {verdict} |")
    return "\n".join(lines)


def execute(folder: Path, *command: str | Path) -> float:
    """Run a command to its end, which must be a good one; returns its wall time in seconds."""
    ours = ("PLUMBLINE_", "PREFECT_", "MLFLOW_", "DVC_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return seconds


def git(folder: Path, *arguments: str) -> None:
    """Run git under a name that need not be set up."""
    settings = ("user.name=Benchmark", "user.email=benchmark@localhost", "commit.gpgsign=false")
    execute(folder, "git", *(part for s in settings for part in ("-c", s)), *arguments)


# In the process that is measured.


class Timer(importlib.abc.MetaPathFinder):
    """Wraps functions of modules as these are imported, and adds up the seconds inside them."""

    def __init__(
        self, functions: dict[str, tuple[str, ...]], within: "Timer | None" = None
    ) -> None:
        self.functions = functions
        self.within = within
        self.seconds: dict[str, float] = {}
        self.depth = 0

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Find a module whose functions are timed."""
        if fullname not in self.functions:
            return None
        # The other timers may have functions of the same module.
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute_module = loader.exec_module

        def wrapped(module: ModuleType) -> None:
            execute_module(module)
            if not self.functions[fullname]:
                self.seconds[f"until {fullname} is imported"] = time.perf_counter() - began
            for name in self.functions[fullname]:
                *owners, function = name.split(".")
                owner: Any = getattr(module, owners[0]) if owners else module
                setattr(owner, function, self.timed(name, getattr(owner, function)))

        loader.exec_module = wrapped
        return spec

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed where none of the others is running around it."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            outermost = not self.depth
            self.depth += 1
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if outermost and (self.within is None or self.within.depth):
                    spent = time.perf_counter() - started
                    self.seconds[name] = self.seconds.get(name, 0.0) + spent

        return call


working = Timer(TIMED)
logging = Timer(LOGGING, within=working)
rest = Timer(REST)


def timed_command() -> None:
    """Run the command line of Plumbline with timers, and write what they say as it exits."""
    _, _, out, *arguments = sys.argv
    sys.meta_path[:0] = [working, logging, rest]
    spent = {"working": working.seconds, "logging": logging.seconds, "rest": rest.seconds}
    atexit.register(lambda: Path(out).write_text(json.dumps(spent, indent=1)))
    sys.argv = ["plumbline", *arguments]
    # Not this script's folder, which is first on the path now.
    sys.path[0] = str(BIN)
    from flows.cli import app

    app()


if __name__ == "__main__":
    if sys.argv[1:2] == ["timed"]:
        timed_command()
    else:
        sys.exit(main())
