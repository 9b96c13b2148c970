"""The project's own code reads and writes nothing that can hold code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = re.compile(
    r"torch\.load|from torch import .*\bload\b|pickle|joblib|\bdill\b|\bshelve\b|\bmarshal\b"
    r"|trust_remote_code\s*=\s*True|weights_only\s*=\s*False|yaml\.(unsafe_|full_)?load\b",
    re.IGNORECASE,
)
ALLOWED = ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION",)
"""Names that switch it off elsewhere."""


def findings(text: str) -> list[str]:
    for name in ALLOWED:
        text = text.replace(name, "")
    return [line.strip() for line in text.splitlines() if FORBIDDEN.search(line)]


@pytest.mark.parametrize("folder", ["src", "tasks", "flows"])
def test_no_module_reads_what_can_hold_code(folder):
    modules = sorted((ROOT / folder).rglob("*.py"))
    assert modules

    found = {str(path.relative_to(ROOT)): findings(path.read_text()) for path in modules}

    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        'state = torch.load("a.pt")',
        "from torch import load, nn",
        "import cloudpickle",
        "import joblib",
        "AutoModel.from_pretrained(name, trust_remote_code = True)",
        "allow_pickle=True",
    ],
)
def test_what_is_looked_for_is_found(line):
    assert findings(line)


def test_the_switch_that_forbids_it_is_no_finding():
    assert findings('"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",') == []
