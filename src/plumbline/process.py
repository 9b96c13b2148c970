"""Which process did something, and whether it still lives."""

import platform
import sys
from pathlib import Path

import psutil

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")
SECONDS_OF_DOUBT = 2.0
"""Clocks are read apart from each other; no number is given to two processes as fast as that."""


def identity(pid: int | None = None) -> str:
    """This process, or that of another number: HOST/BOOT/PID/START.

    Another process never has the same, be it one that gets the same number later, or after a
    reboot, or in a container beside this one.

    Raises:
        psutil.NoSuchProcess: no process has that number.
    """
    process = psutil.Process(pid)
    return "/".join((_host(), _boot(), str(process.pid), f"{_start(process):.2f}"))


def alive(process: str) -> bool | None:
    """Whether the process of an `identity` still runs; None where this host can't tell."""
    try:
        host, boot, pid, start = process.split("/")
        number, started = int(pid), float(start)
    except ValueError:
        return None
    if host != _host():
        return None
    if boot != _boot():
        return False
    try:
        found = psutil.Process(number)
        # A zombie waits for its parent to read its exit code; it will never run again.
        if found.status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(_start(found) - started) < SECONDS_OF_DOUBT
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return None


def pid_of(process: str) -> str:
    """The process number in an `identity`."""
    parts = process.split("/")
    return parts[2] if len(parts) == 4 else process


def _host() -> str:
    # Containers of a pod share a host's name, and each counts its processes from 1.
    space = f":{PID_NAMESPACE.stat().st_ino}" if PID_NAMESPACE.exists() else ""
    return platform.node().replace("/", "-") + space


def _boot() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""


def _start(process: psutil.Process) -> float:
    """Seconds: since the boot on Linux, where times of day move with the clock, else of day."""
    made = float(process.create_time())
    return made - float(psutil.boot_time()) if sys.platform == "linux" else made
