"""Every test that docs/correctness.md names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.findall(
    r"`([\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
)


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_the_test_is_there(file: str, test: str) -> None:
    source = (ROOT / "tests" / "plumbline" / file).read_text(encoding="utf-8")
    assert f"def {test}" in source
