"""A small project with real DVC data, a real Prefect server, and the command line."""

import json
import os
import random
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings

# A busy machine draws slowly, too.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Two threads on matrices of 32 columns only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
ROWS = {"demonstrations": 240, "preferences": 240, "prompts": 120}
SECONDS_A_COMMAND = 180
OURS = ("PLUMBLINE_", "PREFECT_", "MLFLOW_", "DVC_")
HEAVY = ("run", "chat", "compare", "gc", "promote", "verify")
"""Commands that import much; the tests fork them from a process that has done so (warm.py)."""
SECRETS = {
    "HF_TOKEN": "planted-hub-token",
    "AWS_SECRET_ACCESS_KEY": "planted-key-of-a-store",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-of-mlflow",
}
"""What the environment of every command holds, and nothing may write down."""
SAMPLED_OFTEN = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2"}
"""So that the load of the machine has points although no step may last a second."""

TINY = """\
description: Every step in a few seconds.
precision: fp32
data:
  test_fraction: 0.2
  max_prompt_tokens: 56
  max_response_tokens: 104
model:
  source: scratch
  vocab_size: 400
  context_tokens: 160
  hidden_size: 32
  layers: 1
  heads: 2
sft:
  epochs: 1
reward_model:
  epochs: 1
rl:
  episodes: 32
  rollout_batch_size: 16
  mini_batch_size: 8
  epochs: 1
  kl_coef: 0.05
sampling:
  response_tokens: 24
evaluate:
  max_prompts: 16
  bootstrap_samples: 100
  best_of_n: 2
  gold: plumbline.evaluation.principles:gold_score
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--screenshots", type=Path, metavar="FOLDER", help="Save pictures of the pages here."
    )


LONGEST = (
    "flows/services/test_up.py",
    "flows/test_stopping.py",
    "flows/sweeps/test_flow.py",
    "flows/alignment/test_flow.py",
    "flows/reproducing/test_command.py",
    "flows/promotion/test_flow.py",
    "test_chaos.py",
    "plumbline/training/test_resume.py",
    "flows/services/test_prefect_server.py",
    "flows/storage/test_damage.py",
    "flows/alignment/test_methods.py",
    "flows/test_browser.py",
    "flows/alignment/test_resume.py",
    "tasks/test_outage.py",
    "tasks/test_sources.py",
    "flows/alignment/test_planning.py",
    "flows/comparing/test_runs.py",
)
"""Files that take longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let these begin first: of several processes, none is left alone with one at the end."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


class Forked(subprocess.Popen[str]):
    """A command that `Warm` has forked."""

    def __init__(self, arguments: Sequence[str], pid: int, files: Sequence[Any], status: int):
        self.args = arguments
        self.pid = pid
        self.returncode = None
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._sigint_wait_secs = False, 0
        self._files = files
        self._status = status

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(os.read(self._status, 64))
            os.close(self._status)
        return self.returncode

    def communicate(self, input: None = None, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read().decode())
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Warm:
    """A process of warm.py, once a command is to be forked from it."""

    def __init__(self) -> None:
        self._path = os.environ.get("PYTHONPATH")
        self._running = ExitStack()
        self._orders: socket.socket | None = None

    def fits(self, arguments: Sequence[str], changes: dict[str, str]) -> bool:
        """Whether a command that is forked is the same as one that is started."""
        same = not changes and os.environ.get("PYTHONPATH") == self._path
        return same and arguments[0] in HEAVY

    def fork(self, arguments: Sequence[str], cwd: Path, env: dict[str, str]) -> Forked:
        orders = self._orders = self._orders or self._start()
        files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  they stay open
        reading, writing = os.pipe()
        order = {"arguments": arguments, "cwd": str(cwd), "env": env}
        descriptors = [file.fileno() for file in files] + [writing]
        socket.send_fds(orders, [json.dumps(order).encode()], descriptors)
        os.close(writing)
        pid = orders.recv(64)
        assert pid, "warm.py has ended: its error is above"
        return Forked(arguments, int(pid), files, reading)

    def _start(self) -> socket.socket:
        home = Path(self._running.enter_context(tempfile.TemporaryDirectory()))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, ROOT / "tests" / "warm.py", str(theirs.fileno()), home],
                cwd=ROOT,
                env=SmallProject(home, home).environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._running.callback(process.wait)
        self._running.enter_context(ours)
        return ours

    def end(self) -> None:
        self._running.close()


WARM = Warm()


class SmallProject:
    """A project's folder with the one for its generated files, and its commands."""

    def __init__(self, root: Path, home: Path, prefect_api: str | None = None) -> None:
        self.root = root
        self.home = home
        self.prefect_api = prefect_api

    @property
    def data(self) -> Path:
        return self.root / "data" / "sample"

    def rows(self, table: str) -> list[dict[str, Any]]:
        text = (self.data / f"{table}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def write_rows(self, table: str, rows: list[dict[str, Any]]) -> None:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.data / f"{table}.jsonl").write_text("".join(lines), encoding="utf-8")

    def dvc(self, *arguments: str) -> None:
        """Run DVC here; it is expected to work."""
        _execute(sys.executable, "-m", "dvc", *arguments, "--quiet", cwd=self.root)

    def git(self, *arguments: str) -> str:
        """Run git here, as somebody; it is expected to work. Returns what it says."""
        settings = ("user.name=Test", "user.email=test@localhost", "commit.gpgsign=false")
        options = [part for setting in settings for part in ("-c", setting)]
        command = ["git", *options, *arguments]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def environment(self, **changes: str) -> dict[str, str]:
        """As it is here, but with nothing that points elsewhere."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        api = {"PREFECT_API_URL": self.prefect_api} if self.prefect_api else {}
        # As wide as a terminal never is: no message is broken where a test looks for its words.
        ours = {"COLUMNS": "500", "PLUMBLINE_HOME": str(self.home)}
        return {**kept, **SECRETS, **api, **ours, **changes}

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Let `plumbline ARGUMENTS` begin, and do not wait for it."""
        if WARM.fits(arguments, env):
            return WARM.fork(arguments, self.root, self.environment())
        return self.start_anew(*arguments, **env)

    def start_anew(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start `plumbline ARGUMENTS`, and do not wait for it; what it says can be read at once."""
        return subprocess.Popen(
            [Path(sys.executable).with_name("plumbline"), *arguments],
            cwd=self.root,
            env=self.environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell that runs the tests in the background makes its children deaf to SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def cli(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `plumbline ARGUMENTS` as a user would."""
        with self.start(*arguments, **env) as process:
            try:
                stdout, stderr = process.communicate(timeout=SECONDS_A_COMMAND)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def result(self, command: str, *arguments: str, **env: str) -> dict[str, Any]:
        """Run `plumbline COMMAND tiny ARGUMENTS`, which must work; returns what --json wrote."""
        file = self.root / f"{command}.json"
        done = self.cli(command, "tiny", "--json", str(file), *arguments, **env)
        assert done.returncode == 0, done.stdout + done.stderr
        value: dict[str, Any] = json.loads(file.read_bytes())
        file.unlink()
        return value


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests generate in this process stays out of the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMBLINE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _warm() -> Iterator[None]:
    """Ends the process from which commands were forked, if there was one."""
    yield
    WARM.end()


def _execute(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory) -> SmallProject:
    from plumbline.data import sample

    root = tmp_path_factory.mktemp("template") / "project"
    (root / "params").mkdir(parents=True)
    (root / "params" / "tiny.yaml").write_text(TINY)
    (root / ".gitignore").write_text("/data\n/.plumbline/\n")
    project = SmallProject(root, root / ".plumbline")
    project.data.mkdir(parents=True)
    for table, count in ROWS.items():
        rows = getattr(sample, table)(random.Random(table))
        project.write_rows(table, list(islice(rows, count)))
    _execute("git", "init", "--quiet", "--initial-branch=main", cwd=root)
    project.dvc("init")
    shutil.copyfile(ROOT / ".dvc" / "config", root / ".dvc" / "config")
    project.dvc("add", "data")
    project.dvc("push")
    _execute("git", "add", "--all", cwd=root)
    settings = ("user.name=Test", "user.email=test@localhost", "commit.gpgsign=false")
    options = [part for setting in settings for part in ("-c", setting)]
    _execute("git", *options, "commit", "--quiet", "-m", "A small project", cwd=root)
    return project


@pytest.fixture(scope="session")
def make_project(
    _template: SmallProject, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., SmallProject]:
    """Makes a fresh project, with a folder for generated files of its own unless one is given."""

    def make(home: Path | None = None, prefect_api: str | None = None) -> SmallProject:
        root = tmp_path_factory.mktemp("small") / "project"
        shutil.copytree(_template.root, root, symlinks=True)
        return SmallProject(root, home or root / ".plumbline", prefect_api)

    return make


@pytest.fixture
def project(make_project: Callable[..., SmallProject]) -> SmallProject:
    """A fresh project, for commands that stop before a server is needed."""
    return make_project()


@pytest.fixture
def served_project(make_project: Callable[..., SmallProject], prefect_api: str) -> SmallProject:
    """A fresh project whose runs go to the session's Prefect server."""
    return make_project(prefect_api=prefect_api)


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API of a Prefect server of its own, on a free port of this machine."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"
    command = ["server", "start", "--host", "127.0.0.1", "--port", str(port)]
    env = SmallProject(home, home).environment(
        PREFECT_HOME=str(home), PREFECT_SERVER_ANALYTICS_ENABLED="false"
    )
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", *command],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            _wait_for_health(api, server, home / "server.log")
            yield api
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait_for_health(api: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{api}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the Prefect server did not start: {log.read_text()[-3000:]}")


class Trained(NamedTuple):
    """A project that has run once, and what `run --json` wrote."""

    project: SmallProject
    first: dict[str, Any]


@pytest.fixture(scope="session")
def _trained_once(make_project: Callable[..., SmallProject], prefect_api: str) -> Trained:
    project = make_project(prefect_api=prefect_api)
    # Of a started process, as a user's is.
    return Trained(project, project.result("run", **SAMPLED_OFTEN))


PLACES = {
    "runs": ("artifact_uri",),
    "experiments": ("artifact_location",),
    "logged_models": ("artifact_location",),
    "model_versions": ("storage_location",),
}
"""Columns of MLflow's database that say where files are."""


@pytest.fixture(scope="module")
def trained(_trained_once: Trained, make_project: Callable[..., SmallProject]) -> Trained:
    """A project whose experiment has run once; tests leave its data and its results as they are.

    A copy for each module: to train anew would bring out the same.
    """
    project = make_project(prefect_api=_trained_once.project.prefect_api)
    old, new = str(_trained_once.project.home), str(project.home)
    with closing(sqlite3.connect(f"{old}/mlflow.db")) as database:
        database.execute("pragma wal_checkpoint(truncate)")
    shutil.copytree(old, new)
    for record in (project.home / "results").iterdir():
        record.write_text(record.read_text().replace(old, new))
    with closing(sqlite3.connect(f"{new}/mlflow.db")) as database:
        for table, columns in PLACES.items():
            for column in columns:
                database.execute(
                    f"update {table} set {column} = replace({column}, ?, ?)", (old, new)
                )
        database.commit()
    return Trained(project, json.loads(json.dumps(_trained_once.first).replace(old, new)))
