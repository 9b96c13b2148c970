"""A few of the kills of benchmarks/chaos.py, on a small experiment."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "chaos.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("chaos", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_killed_runs_end_as_if_nothing_had_been(make_project, tmp_path, monkeypatch):
    chaos = load()
    # One in the middle of a training, one between steps that are quick, one at the very end.
    monkeypatch.setattr(chaos, "_victims", lambda steps, kills: ["rl", "evaluate", chaos.ENDING])
    project = make_project()
    settings = ("rl.episodes=640", "checkpoints.every_steps=2")

    class Experiment(chaos.Experiment):
        """The undisturbed run is started, and those after it are forked, which is quicker."""

        def start(self, result: Path) -> Any:
            if not self.home.exists():
                return super().start(result)
            words = [word for setting in self.settings for word in ("--set", setting)]
            return project.start("run", self.name, "--record", "--json", str(result), *words)

    project.home = tmp_path / "home"
    experiment = Experiment(project.root, project.home, "tiny", settings)

    trials = list(chaos.chaos(experiment, 3, random.Random(0)))

    assert [trial.faults for trial in trials] == [[], [], []], chaos.table(trials)


def test_every_step_has_its_turn():
    chaos = load()
    steps = {name: {"seconds": seconds} for name, seconds in (("a", 1), ("b", 9), ("c", 5))}

    victims = chaos._victims(steps, 12)

    assert {name: victims.count(name) for name in victims} == {
        "starting": 2, "a": 2, "b": 3, "c": 3, "ending": 2,
    }  # fmt: skip


def test_what_is_left_over_is_found(make_project, tmp_path):
    chaos = load()
    home = tmp_path / "home"
    for folder in ("locks", "checkpoints", "prefect"):
        (home / folder).mkdir(parents=True)
    (home / "locks" / "sft-1.lock").touch()
    (home / "checkpoints" / "sft-1").mkdir()
    for file, statements in {
        "mlflow.db": [
            "create table runs (name text, status text)",
            "insert into runs values ('open one', 'RUNNING'), ('closed one', 'KILLED')",
        ],
        "prefect/prefect.db": [
            "create table flow_run (name text, state_type text)",
            "create table task_run (name text, state_type text)",
            "insert into task_run values ('sft-0', 'RUNNING'), ('rl-0', 'COMPLETED')",
        ],
    }.items():
        with chaos.closing(chaos.sqlite3.connect(home / file)) as database:
            for statement in statements:
                database.execute(statement)
            database.commit()

    assert chaos.leftovers(home) == [
        "lock sft-1.lock",
        "checkpoint sft-1",
        "mlflow.db: open one is open",
        "prefect/prefect.db: sft-0 is open",
    ]
