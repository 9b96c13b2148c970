"""The process that starts the points of a sweep."""

from pathlib import Path

import psutil
import pytest

from flows.sweeps.points import Starter
from plumbline.errors import DataError


def test_a_check_that_fails_ends_the_starter_and_has_started_no_server(tmp_path: Path) -> None:
    before = {*psutil.Process().children()}
    starter = Starter(tmp_path)
    (begun,) = {*psutil.Process().children()} - before
    with pytest.raises(DataError), starter.unless_failing():
        raise DataError("a row is broken")
    assert not begun.is_running()
    assert not list(tmp_path.iterdir())
