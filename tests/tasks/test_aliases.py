"""Tests of tasks.aliases."""

from pathlib import Path

import pytest

from tasks.aliases import move_alias, note_version, noted_version

NAME, ALIAS = "policy", "challenger"


def note(home: Path, version: str, current: str | None) -> None:
    note_version(home, NAME, ALIAS, version, lambda name, alias: current)


def test_a_note_says_where_the_alias_points(tmp_path: Path) -> None:
    assert noted_version(tmp_path, NAME, ALIAS) is None
    note(tmp_path, "5", "5")
    note_version(tmp_path, NAME, "champion", "3", lambda name, alias: "3")
    assert noted_version(tmp_path, NAME, ALIAS) == "5"
    assert noted_version(tmp_path, NAME, "champion") == "3"


@pytest.mark.parametrize("current", ["6", None])
def test_where_another_run_pointed_it_meanwhile_nothing_is_noted(
    tmp_path: Path, current: str | None
) -> None:
    note(tmp_path, "5", current)
    assert noted_version(tmp_path, NAME, ALIAS) is None


def test_a_kill_between_the_move_and_the_note_leaves_no_note(tmp_path: Path) -> None:
    note(tmp_path, "5", "5")

    def killed() -> None:
        assert noted_version(tmp_path, NAME, ALIAS) is None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        move_alias(tmp_path, NAME, ALIAS, killed)
    assert noted_version(tmp_path, NAME, ALIAS) is None
