"""Measuring in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.speed.machine import ROOT, Load
from benchmarks.speed.worker import Result, Spec, timed

LONGEST_S = 1800
"""A process that takes longer hangs."""
TOLD = 30
"""Lines of a failed process's log that are shown."""


class ProcessError(Exception):
    """A measured process failed."""


class Measured(NamedTuple):
    """What a process said, and what it took."""

    result: Result
    seconds: float
    others: float
    """Share of the machine that others took meanwhile."""


def run_worker(
    python: Path, module: str, spec: Spec, environment: Mapping[str, str], *, ours: bool
) -> Measured:
    """Let a module of this package do what the spec says.

    Args:
        python: of the environment that it runs in.
        module: below `benchmarks.speed`.
        spec: passed on as JSON.
        environment: variables for it.
        ours: whether it imports Plumbline.

    Raises:
        ProcessError: it failed, or took too long.
    """
    command = [str(python), "-m", f"benchmarks.speed.{module}", json.dumps(spec)]
    paths = [str(ROOT / "src"), str(ROOT)] if ours else []
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return run_command(
        command,
        inherited
        | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        # Fast tokenizers' threads would only compete.
        | {"TOKENIZERS_PARALLELISM": "false"}
        | dict(environment),
    )


def run_command(command: list[str], environment: Mapping[str, str]) -> Measured:
    """Run a command whose last line of output is a JSON object.

    Raises:
        ProcessError: it failed, or took too long.
    """
    load = Load()
    with tempfile.TemporaryFile() as log, timed() as clock:
        child = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdout=subprocess.PIPE, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        before = os.times()
        try:
            out, _ = child.communicate(timeout=LONGEST_S)
        except BaseException as error:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise ProcessError(f"{command[2]} took longer than {LONGEST_S} s") from error
            raise
        after = os.times()
        if child.returncode:
            log.seek(0)
            lines = log.read().decode(errors="replace").splitlines()[-TOLD:]
            raise ProcessError(
                f"{' '.join(command[1:])} ended with {child.returncode}:\n" + "\n".join(lines)
            )
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    try:
        result = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise ProcessError(f"expected a line of JSON from {command[2]}, got {out!r}") from error
    return Measured(result, clock.seconds, load.others(cpu))


def run_script(name: str, *arguments: str) -> Measured:
    """Run one of the other benchmarks, which write a list of rows with `--json`.

    Raises:
        ProcessError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        script = [str(ROOT / "benchmarks" / name), *arguments, "--json", str(out)]
        return run_command([sys.executable, "-c", _SCRIPT, *script], os.environ)


# It exits with 1 where a bar is missed, which the table says by itself.
_SCRIPT = """\
import json, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], stdout=sys.stderr)
print(json.dumps({"rows": json.load(open(sys.argv[-1]))}))
"""


def own_python() -> Path:
    """The interpreter that runs this, with Plumbline installed."""
    return Path(sys.executable)
