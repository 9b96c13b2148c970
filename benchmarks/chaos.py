"""Kill an experiment at random instants of every step, re-run it to the end, and compare.

    python benchmarks/chaos.py run --kills 30 --home chaos    # prints a table; JSON in chaos.json
    python benchmarks/chaos.py table chaos.json more.json     # one table of several such runs

Once undisturbed, then for each kill: the result of one step is forgotten (those of all steps, for
a kill before the first one), the run starts, is killed (SIGKILL) at a random instant of that step,
and is run again to its end.
Then every digest must be that of the undisturbed run, no step whose result was there may have run
again, and no lock, no checkpoint, no process and no RUNNING run may be left. Exit code 1 if not.
"""

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

STARTING, ENDING = "starting", "ending"
"""Before the first step, and after the last one."""

ELSEWHERE = ("PREFECT_", "MLFLOW_", "DVC_")
"""Begin variables that would lead a run out of its home."""


class Trial(NamedTuple):
    """One kill and what became of it."""

    step: str
    after_s: float
    """Seconds into the step."""
    finished: int
    """Steps whose results were there when the process died."""
    resumed_from: str
    """Where training went on in the second run; empty where there was no checkpoint."""
    rerun_s: float
    faults: list[str]


class Experiment(NamedTuple):
    """An experiment in a home of its own."""

    root: Path
    home: Path
    name: str
    settings: tuple[str, ...]

    def start(self, result: Path) -> subprocess.Popen[str]:
        """Start the run that `result` will tell of."""
        command = [sys.executable, "-m", "flows.cli", "run", self.name, "--record"]
        command += [word for setting in self.settings for word in ("--set", setting)]
        code = str(Path(__file__).resolve().parents[1])
        return subprocess.Popen(
            [*command, "--json", str(result)],
            cwd=self.root,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith(ELSEWHERE)},
                "PLUMBLINE_HOME": str(self.home),
                "PYTHONPATH": f"{code}/src:{code}",
                "COLUMNS": "300",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.home.with_suffix(".log")).open("a"),
            text=True,
        )

    def run(self, result: Path) -> dict[str, Any]:
        """Run to the end; returns what --json wrote."""
        result.unlink(missing_ok=True)
        code = self.start(result).wait()
        if code != 0:
            raise SystemExit(f"the run failed ({code}): see {self.home.with_suffix('.log')}")
        return dict(json.loads(result.read_bytes()))


def main() -> None:
    """Make the kills, or read what came of them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--kills", type=int, default=30)
    run.add_argument("--experiment", default="quickstart")
    run.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    run.add_argument("--project", type=Path, default=Path.cwd(), help="the project's folder")
    run.add_argument("--home", type=Path, required=True, help="a new folder")
    run.add_argument("--seed", type=int, default=0, help="of the instants")
    commands.add_parser("table").add_argument("files", nargs="+", type=Path)
    asked = parser.parse_args()

    trials = []
    if asked.command == "run":
        home = asked.home.resolve()
        experiment = Experiment(asked.project, home, asked.experiment, tuple(asked.settings))
        for trial in chaos(experiment, asked.kills, random.Random(asked.seed)):
            trials.append(trial)
            home.with_suffix(".json").write_text(json.dumps([each._asdict() for each in trials]))
            print(f"{len(trials)}/{asked.kills}", trial, file=sys.stderr, flush=True)
    else:
        trials = [Trial(**row) for file in asked.files for row in json.loads(file.read_bytes())]
    print(table(trials))
    sys.exit(any(trial.faults for trial in trials))


def chaos(experiment: Experiment, kills: int, draw: random.Random) -> Iterator[Trial]:
    """Run once undisturbed, then kill and re-run as often as asked."""
    result = experiment.home.with_suffix(".run.json")
    undisturbed = experiment.run(result)
    for step in _victims(undisturbed["steps"], kills):
        yield _trial(experiment, result, undisturbed, step, draw)


def _victims(steps: dict[str, Any], kills: int) -> list[str]:
    """Every step as often as the others; what is left over goes to the longest ones."""
    names = [STARTING, *steps, ENDING]
    longest = sorted(steps, key=lambda name: -steps[name]["seconds"])
    return (names * (kills // len(names)) + longest)[:kills]


def _trial(
    experiment: Experiment,
    result: Path,
    undisturbed: dict[str, Any],
    step: str,
    draw: random.Random,
) -> Trial:
    steps = undisturbed["steps"]
    forget = {STARTING: [*steps], ENDING: []}.get(step, [step])
    seconds = steps[step]["seconds"] if step in steps else 5.0
    while True:
        for name in forget:
            (experiment.home / "results" / steps[name]["key"]).unlink(missing_ok=True)
        result.unlink(missing_ok=True)
        after = draw.uniform(0, seconds)
        process = experiment.start(result)
        if _reach(experiment, process, step, steps):
            with suppress(subprocess.TimeoutExpired):
                process.wait(after)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            break
        # It ended before the instant came: draw an earlier one.
        seconds = after

    finished = {
        name for name, made in steps.items() if (experiment.home / "results" / made["key"]).exists()
    }
    began = time.monotonic()
    again = experiment.run(result)
    rerun_s = time.monotonic() - began
    faults = [
        f"{name}: digest {made['digest'][:8]}, expected {steps[name]['digest'][:8]}"
        for name, made in again["steps"].items()
        if made["digest"] != steps[name]["digest"]
    ]
    faults += [
        f"{name}: computed again" for name in finished if again["steps"][name]["status"] != "cached"
    ]
    faults += leftovers(experiment.home)
    return Trial(
        step,
        round(after, 1),
        len(finished),
        _resumed_from(experiment.home, again["steps"].get(step)),
        round(rerun_s, 1),
        faults,
    )


def _reach(
    experiment: Experiment, process: subprocess.Popen[str], step: str, steps: dict[str, Any]
) -> bool:
    """Wait until the step has begun; False where the run ended first."""
    if step == STARTING:
        return True
    last = [*steps][-1]
    lock = experiment.home / "locks" / f"{steps[last if step == ENDING else step]['key']}.lock"
    seen = False
    while process.poll() is None:
        there = lock.exists()
        if step != ENDING and there:
            return True
        if step == ENDING and seen and not there:
            return True
        seen = seen or there
        time.sleep(0.01)
    return False


def leftovers(home: Path) -> list[str]:
    """What a finished run must not leave: locks, checkpoints, open runs, processes."""
    found = [f"lock {path.name}" for path in (home / "locks").glob("*")]
    found += [f"checkpoint {path.name}" for path in (home / "checkpoints").glob("*")]
    queries = {
        "mlflow.db": "select name from runs where status = 'RUNNING'",
        "prefect/prefect.db": "select name from flow_run where state_type in "
        "('RUNNING', 'PENDING', 'CANCELLING') union select name from task_run where state_type in "
        "('RUNNING', 'PENDING', 'CANCELLING')",
    }
    for file, query in queries.items():
        with closing(sqlite3.connect(home / file, timeout=30)) as database:
            found += [f"{file}: {name} is open" for (name,) in database.execute(query)]
    deadline = time.monotonic() + 15
    while (left := _processes(home)) and time.monotonic() < deadline:
        time.sleep(0.3)
    return found + [f"process {name}" for name in left]


def _processes(home: Path) -> list[str]:
    return [
        " ".join(process.info["cmdline"] or ())
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid() and str(home) in (process.info["cmdline"] or ())
    ]


def _resumed_from(home: Path, made: dict[str, Any] | None) -> str:
    if made is None:
        return ""
    query = "select value from tags where run_uuid = ? and key = 'resumed_from_step'"
    with closing(sqlite3.connect(home / "mlflow.db", timeout=30)) as database:
        row = database.execute(query, (made["mlflow_run_id"],)).fetchone()
    return str(row[0]) if row else ""


def table(trials: Sequence[Trial]) -> str:
    """Markdown: a row a step, and what went wrong."""
    lines = [
        "| killed in | kills | seconds into it | resumed from a checkpoint | same digests, nothing "
        "computed twice, nothing left |",
        "|---|---:|---|---:|---:|",
    ]
    for step in dict.fromkeys(trial.step for trial in trials):
        rows = [trial for trial in trials if trial.step == step]
        instants = ", ".join(f"{trial.after_s:g}" for trial in rows)
        resumed = sum(bool(trial.resumed_from) for trial in rows)
        good = sum(not trial.faults for trial in rows)
        lines.append(f"| {step} | {len(rows)} | {instants} | {resumed} | {good} of {len(rows)} |")
    good = sum(not trial.faults for trial in trials)
    lines.append(f"| all | {len(trials)} | | | {good} of {len(trials)} |")
    faults = [f"- {trial.step}: {fault}" for trial in trials for fault in trial.faults]
    return "\n".join([*lines, *([""] if faults else []), *faults])


if __name__ == "__main__":
    main()
