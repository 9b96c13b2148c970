"""The Prefect server of a project: shared by its runs, and gone after the last of them."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flows.services import prefect_server

USE = """
import os, sys
from pathlib import Path
from flows.services.prefect_server import join_server, wait_for_server
from tasks import templates
templates.FOLDER = Path(os.environ.get("TEMPLATES", templates.FOLDER))
home = Path(sys.argv[1])
join_server(home)
wait_for_server(home)
print(os.environ["PREFECT_API_URL"], flush=True)
sys.stdin.readline()
"""


class User:
    """A process that uses the server of a home."""

    def __init__(self, home: Path, **env: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        own = {"PREFECT_HOME": str(home / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", USE, str(home)],
            env={**kept, **own, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def api(self) -> str:
        assert self.process.stdout is not None
        said = self.process.stdout.readline().strip()
        assert said, self.process.communicate(timeout=20)
        return said

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.communicate(timeout=20)


def answers(api: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def servers(home: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"flows.services.prefect_server", str(home)} <= set(process.info["cmdline"] or ())
    ]


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_two_runs_share_a_server_that_ends_after_the_last_was_killed(tmp_path):
    first, second = User(tmp_path), User(tmp_path)
    api = first.api()

    assert api.startswith("http://127.0.0.1:")
    assert second.api() == api
    assert len(servers(tmp_path)) == 1
    first.end()
    time.sleep(5)
    assert answers(api)
    second.end()
    wait_until(lambda: not servers(tmp_path))
    assert not answers(api)
    # The next one starts its own, on the same database.
    third = User(tmp_path)
    assert answers(third.api())
    third.end()
    wait_until(lambda: not servers(tmp_path))


def test_a_server_without_a_template_makes_its_database(tmp_path):
    user = User(tmp_path, TEMPLATES=str(tmp_path / "nowhere"))

    assert answers(user.api())
    user.end()
    wait_until(lambda: not servers(tmp_path))


def test_a_killed_server_is_started_again(tmp_path):
    first = User(tmp_path)
    first.api()
    for server in servers(tmp_path):
        server.kill()
    # It stays a zombie until its run ends, and loses its files, and so its lock, last.
    wait_until(lambda: prefect_server._running(tmp_path / "prefect", prefect_server.SHARED) is None)
    second = User(tmp_path)

    assert answers(second.api())
    first.end()
    second.end()
    wait_until(lambda: not servers(tmp_path))


def test_a_server_that_was_named_is_used_as_it_is(tmp_path, prefect_api):
    user = User(tmp_path, PREFECT_API_URL=prefect_api)

    assert user.api() == prefect_api
    assert servers(tmp_path) == []
    user.end()


def test_a_named_server_that_does_not_answer_is_an_error_that_says_so(monkeypatch, tmp_path):
    from plumbline.errors import MachineError

    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(prefect_server.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(prefect_server.time, "sleep", lambda seconds: None)

    with pytest.raises(MachineError, match=r"http://127\.0\.0\.1:9/api does not answer.*unset"):
        prefect_server.wait_for_server(tmp_path)


def test_a_server_that_can_not_start_is_an_error_with_its_log(tmp_path):
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "prefect.db").write_text("this is no database")
    user = User(tmp_path)
    _, errors = user.process.communicate(timeout=120)

    assert user.process.returncode == 1
    assert "does not answer. Its log" in errors
    assert "file is not a database" in errors
