"""A virtual environment for each peer, so that nothing of Plumbline needs it.

python -m benchmarks.speed.peers.environments         # makes those that are missing
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "benchmarks" / ".speed" / "environments"

PEERS = {
    # The last one with PPO, and the transformers that Plumbline is measured with.
    "trl-1.12": ("trl==1.12.0", "transformers=={transformers}"),
    "trl-newest": ("trl",),
}


def ensure(name: str) -> Path:
    """The interpreter of a peer's environment, which is made where it is missing.

    Torch goes first and alone, as in the Makefile: its CPU build is enough, and whatever asks for a
    bare `torch` later finds it installed.

    Raises:
        SystemExit: pip failed.
    """
    folder = FOLDER / name
    python = folder / "bin" / "python"
    locked = _locked()
    packages = [package.format(**locked) for package in PEERS[name]]
    wanted = "\n".join([f"torch=={locked['torch']}", *packages])
    ready = folder / ".ready"
    if ready.is_file() and ready.read_text(encoding="utf-8").strip() == wanted:
        return python
    print(f"Making the environment {name} in {folder.relative_to(ROOT)}", file=sys.stderr)
    _run(sys.executable, "-m", "venv", str(folder))
    for step in ([f"torch=={locked['torch']}"], packages):
        _run(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step)
    ready.write_text(wanted + "\n", encoding="utf-8")
    return python


def _locked() -> dict[str, str]:
    """The versions of requirements.lock."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))


def _run(*command: str) -> None:
    done = subprocess.run(command)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}; the packages come from PyPI, or "
            "from where pip is set up to look. Run again when it can be reached."
        )


if __name__ == "__main__":
    for peer in PEERS:
        print(f"{peer}: {ensure(peer)}")
