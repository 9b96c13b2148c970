"""A run that is stopped in the middle of a training goes on from there when it is repeated."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import subprocess

    from tests.conftest import SmallProject, Trained

EVERY_STEP = ("--set", "checkpoints.every_steps=1")


def wait_for_checkpoint(home: Path, step: str, process: subprocess.Popen[str]) -> None:
    """Wait until a step of a run has its first checkpoint."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        if [*home.glob(f"checkpoints/{step}-*/0*")]:
            return
        if process.poll() is not None:
            pytest.fail(f"the run ended without a checkpoint: {process.communicate()[1]}")
        time.sleep(0.002)
    pytest.fail(f"no checkpoint of {step}")


def test_stopped_trainings_end_in_the_bits_of_an_undisturbed_run(
    trained: Trained, make_project: Callable[..., SmallProject]
) -> None:
    project = make_project(prefect_api=trained.project.prefect_api)
    stops = (
        ("sft", signal.SIGTERM),
        ("reward_model", signal.SIGKILL),
        ("rl", signal.SIGINT),
    )
    for step, number in stops:
        with project.start("run", "tiny", *EVERY_STEP) as process:
            wait_for_checkpoint(project.home, step, process)
            process.send_signal(number)
            _, errors = process.communicate(timeout=90)
        assert process.returncode != 0, errors
        assert [*project.home.glob(f"checkpoints/{step}-*/0*")]

    with project.start("run", "tiny", "--json", str(project.root / "run.json")) as process:
        _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert "rl: goes on from episode" in errors

    steps = json.loads((project.root / "run.json").read_bytes())["steps"]
    found = {name: step["digest"] for name, step in steps.items()}
    expected = {name: step["digest"] for name, step in trained.first["steps"].items()}
    trainings = ("sft", "reward_model", "rl", "evaluate")
    assert {name: found[name] for name in trainings} == {name: expected[name] for name in trainings}
    # Their results are stored: nothing needs the checkpoints any more.
    assert [*project.home.glob("checkpoints/*/*")] == []
