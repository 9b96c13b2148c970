"""The machine that is measured on, its code, and how busy others keep it."""

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[2]
QUIET = 0.1
"""Share of the machine that others may take when a measurement begins."""
PATIENCE_S = 900
CODE = ("src/plumbline", "requirements.lock")
"""What a figure depends on, beside its spec."""


def describe() -> dict[str, Any]:
    """What a reader of the table has to know of the machine."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "transformers")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


class Code(NamedTuple):
    """Which code is measured."""

    commit: str
    tree: str
    """Of what the figures depend on; it stays where only docs change."""
    is_clean: bool
    """Whether the files are those of the commit."""

    @classmethod
    def here(cls) -> "Code":
        """The code of this checkout."""
        trees = [_git("rev-parse", f"HEAD:{path}") for path in CODE]
        changed = _git("status", "--porcelain", "--", *CODE)
        return cls(_git("rev-parse", "--short", "HEAD"), "-".join(trees), not changed)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


class Load:
    """How much of the machine others take between two moments."""

    def __init__(self) -> None:
        """Begin to count."""
        self._busy, self._all = _cpu_seconds()
        self._own = sum(psutil.Process().cpu_times()[:2])

    def others(self, child_cpu_seconds: float) -> float:
        """Share of all cores that neither this process nor its child took so far."""
        busy, total = _cpu_seconds()
        own = sum(psutil.Process().cpu_times()[:2]) - self._own
        taken = busy - self._busy - own - child_cpu_seconds
        return max(0.0, taken / max(total - self._all, 1e-9))


def _cpu_seconds() -> tuple[float, float]:
    times = psutil.cpu_times()._asdict()
    # Linux counts a guest's time as the user's, too.
    total = sum(value for name, value in times.items() if not name.startswith("guest"))
    return total - times["idle"] - times.get("iowait", 0.0), total


def wait_until_quiet() -> None:
    """Wait until others leave the machine alone, for some time at most."""
    until = time.monotonic() + PATIENCE_S
    told = False
    while True:
        load = Load()
        time.sleep(2)
        taken = load.others(0.0)
        if taken <= QUIET:
            return
        if time.monotonic() > until:
            print(f"Others still take {taken:.0%} of the machine; measuring.", file=sys.stderr)
            return
        if not told:
            print(f"Others take {taken:.0%} of the machine; waiting.", file=sys.stderr)
            told = True
