"""Tests of tasks.live: what a progress artifact says, and that the work never waits for it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest

from tasks import live
from tasks.live import LiveProgress, live_progress


class Prefect:
    """Takes artifacts, or fails, or is slow."""

    def __init__(self) -> None:
        self.said: list[tuple[float, str]] = []
        self.failing = False
        self.seconds = 0.0

    def create_artifact(self, made: Any) -> Any:
        self._take(made)
        self.key = made.key
        return SimpleNamespace(id=uuid4())

    def update_artifact(self, artifact: UUID, update: Any) -> None:
        self._take(update)

    def _take(self, given: Any) -> None:
        time.sleep(self.seconds)
        if self.failing:
            raise ConnectionError("away")
        self.said.append((given.data, given.description))


@pytest.fixture
def prefect(monkeypatch: pytest.MonkeyPatch) -> Prefect:
    server = Prefect()

    @contextmanager
    def context() -> Iterator[Any]:
        yield SimpleNamespace(client=server)

    monkeypatch.setattr(live, "SyncClientContext", SimpleNamespace(get_or_create=context))
    monkeypatch.setattr(live, "FlowRunContext", SimpleNamespace(get=lambda: object()))
    monkeypatch.setattr(live, "SECONDS_BETWEEN_UPDATES", 0.05)
    monkeypatch.setattr(live, "SECONDS_BETWEEN_LOOKS", 0.01)
    return server


def wait_for(look: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_threads() -> None:
    wait_for(lambda: all(one.name != "progress" for one in threading.enumerate()))


def test_progress_is_seen_while_the_work_goes_on_and_ends_complete(prefect: Prefect) -> None:
    with live_progress("reward_model", "rows") as progress:
        progress.report(1, 4, {"reward_model/loss": 0.6931, "reward_model/lr": 0.1})
        wait_for(lambda: prefect.said)
        progress.report(4, 4)
    wait_for_threads()
    assert prefect.key == "reward-model-progress"
    percent, words = prefect.said[0]
    assert percent == 25
    assert words.startswith("**reward_model**: 1 of 4 rows, ")
    assert words.endswith(" s left; loss 0.693")
    assert [percent for percent, _ in prefect.said[-1:]] == [100]
    assert "left" not in prefect.said[-1][1]


def test_work_that_fails_says_where_it_stopped(prefect: Prefect) -> None:
    def broken() -> None:
        with live_progress("rl", "episodes") as progress:
            progress.report(1280, 3072)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        broken()
    wait_for_threads()
    assert prefect.said[-1][1].startswith("**rl**: stopped at 1,280 of 3,072 episodes, ")


def test_the_work_does_not_wait_for_a_prefect_that_is_slow_or_away(prefect: Prefect) -> None:
    prefect.seconds, prefect.failing = 1.0, True
    began = time.monotonic()
    with live_progress("rl", "episodes") as progress:
        for done in range(100):
            progress.report(done + 1, 100)
    assert time.monotonic() - began < 0.8
    wait_for_threads()


def test_a_server_that_comes_back_is_told(prefect: Prefect) -> None:
    prefect.failing = True
    with live_progress("rl", "episodes") as progress:
        progress.report(1, 2)
        time.sleep(0.1)
        prefect.failing = False
        progress.report(2, 2)
    wait_for_threads()
    assert [percent for percent, _ in prefect.said] == [100]


def test_outside_of_a_flow_run_nothing_is_shown(
    prefect: Prefect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "FlowRunContext", SimpleNamespace(get=lambda: None))
    with live_progress("rl", "episodes") as progress:
        progress.report(1, 2)
    assert prefect.said == []
    assert isinstance(progress, LiveProgress)
