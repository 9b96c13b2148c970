"""Tests of flows.data.importing: a data set whole and pinned by DVC itself, or nothing changed."""

from __future__ import annotations

import gzip
import json
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flows.data.importing import Imported, import_data, report
from plumbline.data.sources import HubOptions
from plumbline.data.validation import read_dataset, validate
from plumbline.errors import DataError, MachineError, ParamsError
from plumbline.project import Project
from tasks import data_version
from tasks.data_version import add_data, current_version, file_hashes, status, store_in_project

if TYPE_CHECKING:
    from tests.conftest import SmallProject

ROOT = Path(__file__).resolve().parents[3]
REAL = ROOT.parent / "shared" / "data" / "hh-rlhf-harmless" / "harmless-1500.jsonl.gz"
REQUIRED = ("demonstrations", "preferences", "prompts")

PAIRS = [
    {"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No, {i}."} for i in range(60)
]
ANSWERS = [{"instruction": f"Do {i}.", "output": f"Done: {i}."} for i in range(60)]


def source(folder: Path, rows: list[dict[str, Any]], name: str = "source.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(
    project: SmallProject, form: str, path: str, to: str = "data/mine", **options: bool
) -> Imported:
    place = Project(project.root, project.home)
    return import_data(place, form, path, to, HubOptions(), **options)


def table(project: SmallProject, name: str, data_set: str = "mine") -> list[dict[str, Any]]:
    text = (project.root / "data" / data_set / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def state_of(project: SmallProject) -> tuple[dict[str, str], bytes, list[str]]:
    """All that an import may change, and all that it may leave behind."""
    home = sorted(path.name for path in project.home.rglob("*")) if project.home.exists() else []
    aside = [path.name for path in (project.root / ".dvc" / "tmp").glob("import-*")]
    pin = (project.root / "data.dvc").read_bytes()
    return file_hashes(project.root / "data"), pin, home + aside


def refused(project: SmallProject, *arguments: str, **options: bool) -> str:
    """What an import says that is refused; it must have changed nothing."""
    before = state_of(project)
    with pytest.raises((DataError, ParamsError, MachineError)) as raised:
        run(project, *arguments, **options)
    assert state_of(project) == before
    return str(raised.value)


def git(project: SmallProject, *arguments: str) -> str:
    settings = ("user.name=Test", "user.email=test@localhost", "commit.gpgsign=false")
    options = [part for setting in settings for part in ("-c", setting)]
    command = ["git", *options, *arguments]
    done = subprocess.run(command, cwd=project.root, check=True, capture_output=True, text=True)
    return done.stdout


def faults_of(project: SmallProject, data_set: str = "mine") -> list[Any]:
    with tempfile.TemporaryDirectory() as scratch:
        tables, failures = read_dataset(project.root / "data" / data_set, 0.2, Path(scratch))
        return [*failures, *validate(tables)]


def test_a_source_becomes_a_data_set_that_dvc_pins(project, tmp_path):
    before = file_hashes(project.root / "data")

    imported = run(project, "dpo-pairs", source(tmp_path, PAIRS))

    assert imported.rows == dict.fromkeys(REQUIRED, 60)
    assert (imported.read, imported.left_out, imported.left_out_file) == (60, {}, None)
    assert table(project, "preferences") == PAIRS
    assert table(project, "prompts") == [{"prompt": row["prompt"]} for row in PAIRS]
    assert table(project, "demonstrations") == [
        {"prompt": row["prompt"], "response": row["chosen"]} for row in PAIRS
    ]
    assert faults_of(project) == []
    assert status(project.root)["state"] == "clean"
    assert set(current_version(project.root, "data/mine").files) == {f"{t}.jsonl" for t in REQUIRED}
    after = file_hashes(project.root / "data")
    assert {name: after[name] for name in before} == before
    assert state_of(project)[2] == []


def test_the_same_source_gives_the_same_bytes(project, make_project, tmp_path):
    other = make_project()
    path = source(tmp_path, [*PAIRS, PAIRS[0]])

    first, second = run(project, "dpo-pairs", path), run(other, "dpo-pairs", path)

    assert state_of(project)[:2] == state_of(other)[:2]
    assert first.left_out_file is not None
    assert second.left_out_file is not None
    assert first.left_out_file.read_bytes() == second.left_out_file.read_bytes()


def test_what_is_left_out_is_counted_and_listed_outside_the_data(project, tmp_path):
    bad = [{**PAIRS[3], "chosen": " "}, PAIRS[5], {"prompt": "x"}]
    imported = run(project, "dpo-pairs", source(tmp_path, [*PAIRS, *bad]))

    assert imported.left_out == {
        "chosen: blank text": 1,
        "prompt: duplicate of another row": 1,
        "chosen: missing value": 1,
    }
    file = project.home / "imports" / "mine-left-out.jsonl"
    assert imported.left_out_file == file
    listed = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["row"], row["reasons"]) for row in listed] == [
        (61, ["chosen: blank text"]),
        (62, ["prompt: duplicate of source.jsonl:6"]),
        (63, ["chosen: missing value"]),
    ]
    assert listed[0]["record"] == bad[0]
    assert table(project, "preferences") == PAIRS
    assert "3 of 63 rows left out" in report(imported)
    assert str(file) in report(imported)


def test_strict_changes_nothing_where_a_row_is_bad(project, tmp_path):
    path = source(tmp_path, [*PAIRS, PAIRS[5]])

    message = refused(project, "dpo-pairs", path, strict=True)

    assert "1 of 61 rows would be left out" in message
    assert "source.jsonl:61 prompt: duplicate of source.jsonl:6" in message
    assert run(project, "dpo-pairs", source(tmp_path, PAIRS), strict=True).left_out == {}


def test_the_report_says_what_commits_it(project, tmp_path):
    text = report(run(project, "dpo-pairs", source(tmp_path, PAIRS, "it's.jsonl")))

    commands = [line.strip() for line in text.splitlines() if line.startswith("  ")]
    assert "data: {path: data/mine}" in commands
    assert "preferences: 60 rows" in commands
    push, add, commit = (c for c in commands if c.startswith(("dvc ", "git ")))
    assert (push, add) == ("dvc push", "git add data.dvc .dvc-store")
    project.dvc("push")
    for command in (add, commit):
        git(project, *shlex.split(command)[1:])
    assert git(project, "status", "--porcelain") == ""
    assert "Import it's.jsonl as data/mine" in git(project, "log", "-1")


def test_a_remote_elsewhere_is_not_to_be_committed(project, tmp_path):
    config = project.root / ".dvc" / "config"
    assert store_in_project(project.root) == ".dvc-store"
    for url in (tmp_path, "https://example.com/x"):
        config.write_text(f"[core]\nremote = away\n['remote \"away\"']\nurl = {url}\n")
        assert store_in_project(project.root) is None
    config.write_text("")
    assert store_in_project(project.root) is None


# A source without preferences


def test_a_source_without_preferences_says_what_is_missing(project, tmp_path):
    imported = run(project, "alpaca", source(tmp_path, ANSWERS))

    assert imported.rows == {"demonstrations": 60, "prompts": 60}
    (note,) = imported.notes
    assert "preferences are still missing" in note
    assert "--to data/mine --merge" in note
    assert note in report(imported)
    assert status(project.root)["state"] == "clean"


def test_merging_adds_the_missing_tables_and_no_others(project, tmp_path):
    run(project, "alpaca", source(tmp_path, ANSWERS))
    before = file_hashes(project.root / "data" / "mine")

    imported = run(project, "dpo-pairs", source(tmp_path, PAIRS), merge=True)

    assert (imported.rows, imported.kept) == ({"preferences": 60}, ["demonstrations", "prompts"])
    assert imported.notes == []
    assert "prompts: there before, not changed" in report(imported)
    after = file_hashes(project.root / "data" / "mine")
    assert {name: after[name] for name in before} == before
    assert table(project, "preferences") == PAIRS
    assert faults_of(project) == []
    assert status(project.root)["state"] == "clean"


def test_merging_leaves_files_of_other_kinds_alone(project, tmp_path):
    folder = project.root / "data" / "mine"
    folder.mkdir()
    (folder / "demonstrations.csv").write_text(
        "prompt,response\n" + "".join(f"Q {i}?,Yes\n" for i in range(60))
    )
    (folder / "README.md").write_text("mine")
    add_data(project.root)

    run(project, "dpo-pairs", source(tmp_path, PAIRS), merge=True)

    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "demonstrations.csv",
        "preferences.jsonl",
        "prompts.jsonl",
    ]


def test_merging_nothing_new_is_refused(project, tmp_path):
    path = source(tmp_path, PAIRS)

    message = refused(project, "dpo-pairs", path, "data/sample", merge=True)

    assert "data/sample has every table that dpo-pairs gives already" in message


def test_merging_into_a_data_set_that_breaks_a_rule_is_refused(project, tmp_path):
    run(project, "alpaca", source(tmp_path, ANSWERS))
    file = project.root / "data" / "mine" / "demonstrations.jsonl"
    file.write_text(file.read_text() + '{"prompt": "x", "response": ""}\n')
    add_data(project.root)

    message = refused(project, "dpo-pairs", source(tmp_path, PAIRS), merge=True)

    assert "demonstrations.jsonl:61 response: blank text" in message


def test_a_source_too_small_to_split_is_imported_with_a_note(project, tmp_path):
    imported = run(project, "dpo-pairs", source(tmp_path, PAIRS[:1]))

    assert len(imported.notes) == 3
    assert all("data.test_fraction" in note for note in imported.notes)


# What is refused


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ("mine", "expected a folder below data/"),
        ("../data/mine", "expected a folder below data/"),
        ("data/../mine", "expected a folder below data/"),
        ("/data/mine", "expected a folder below data/"),
        ("data", "expected data/NAME"),
        ("data/sample/mine", "expected data/NAME"),
        ("data/sample", "is there already"),
    ],
)
def test_a_target_that_is_not_free_is_refused(project, tmp_path, to, expected):
    message = refused(project, "dpo-pairs", source(tmp_path, PAIRS), to)

    assert expected in message
    if "there already" in message:
        assert "--merge" in message
        assert "rm -r data/sample && dvc add data" in message


def test_a_target_that_is_a_file_is_refused(project, tmp_path):
    (project.root / "data" / "mine").write_text("")
    add_data(project.root)

    assert "data/mine is a file" in refused(project, "dpo-pairs", source(tmp_path, PAIRS))


def test_an_empty_target_is_taken(project, tmp_path):
    (project.root / "data" / "mine").mkdir()

    run(project, "dpo-pairs", source(tmp_path, PAIRS))

    assert table(project, "preferences") == PAIRS


def test_an_unknown_format_is_named_with_the_nearest(project, tmp_path):
    assert "did you mean dpo-pairs?" in refused(project, "dpo_pair", source(tmp_path, PAIRS))


def test_a_wrong_format_is_answered_with_the_columns_and_the_right_one(project, tmp_path):
    message = refused(project, "hh-rlhf", source(tmp_path, ANSWERS))

    assert "expected the columns chosen and rejected" in message
    assert "got instruction, output" in message
    assert "It looks like alpaca" in message
    assert "source.jsonl:1: chosen: missing value" in message


def test_a_source_in_no_known_format_is_refused(project, tmp_path):
    message = refused(project, "sharegpt", source(tmp_path, [{"text": "x"}]))

    assert "got text." in message
    assert "looks like" not in message


def test_a_missing_source_is_refused(project):
    assert "There is no nothing.jsonl" in refused(project, "sharegpt", "nothing.jsonl")


@pytest.mark.parametrize("edit", ["changed", "new"])
@pytest.mark.parametrize("with_missing", [False, True])
def test_edits_that_nobody_added_are_refused_before_the_source_is_read(project, edit, with_missing):
    name = "prompts.jsonl" if edit == "changed" else "other.jsonl"
    (project.data / name).write_text("")
    if with_missing:
        (project.data / "preferences.jsonl").unlink()

    message = refused(project, "dpo-pairs", "nothing.jsonl")

    assert f"{edit}: data/sample/{name}" in message
    assert "an import would pin this too" in message
    assert "dvc add data" in message


def test_edits_made_during_the_import_are_refused(project, tmp_path, monkeypatch):
    def edit_and_read(*arguments: Any) -> Any:
        (project.data / "prompts.jsonl").write_text("")
        return read_source(*arguments)

    from flows.data.importing import read_source

    monkeypatch.setattr("flows.data.importing.read_source", edit_and_read)
    pin = (project.root / "data.dvc").read_bytes()

    with pytest.raises(DataError, match=r"changed: data/sample/prompts\.jsonl"):
        run(project, "dpo-pairs", source(tmp_path, PAIRS))

    assert (project.root / "data.dvc").read_bytes() == pin
    assert not (project.root / "data" / "mine").exists()


def test_data_that_is_not_there_is_pulled_first(project, tmp_path):
    sample = file_hashes(project.data)
    shutil.rmtree(project.root / "data")
    shutil.rmtree(project.root / ".dvc" / "cache")

    run(project, "dpo-pairs", source(tmp_path, PAIRS))

    assert file_hashes(project.data) == sample
    assert status(project.root)["state"] == "clean"


# What goes wrong on the way


@pytest.mark.parametrize(
    ("error", "merge"),
    [(DataError("no room"), True), (OSError("no room"), False), (KeyboardInterrupt(), True)],
)
def test_an_error_while_dvc_adds_leaves_all_as_it_was(project, tmp_path, monkeypatch, error, merge):
    run(project, "alpaca", source(tmp_path, ANSWERS))
    before = state_of(project)

    def add_and_fail(root: Path) -> str:
        data_version.add_data(root)
        raise error

    monkeypatch.setattr("flows.data.importing.add_data", add_and_fail)
    expected = MachineError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        run(
            project,
            "dpo-pairs",
            source(tmp_path, PAIRS),
            "data/mine" if merge else "data/other",
            merge=merge,
        )

    assert state_of(project) == before
    assert status(project.root)["state"] == "clean"


def test_a_folder_that_can_not_be_written_is_a_fault_of_the_machine(project, tmp_path):
    project.home.mkdir()
    (project.home / "imports").write_text("in the way")

    message = refused(project, "dpo-pairs", source(tmp_path, [*PAIRS, PAIRS[0]]))

    assert "data/mine" in message


def test_dvc_s_own_errors_are_errors_of_the_data(project):
    shutil.rmtree(project.root / ".dvc")

    with pytest.raises(DataError, match="Can't add data/ to DVC"):
        add_data(project.root)


# Real rows, and the command


@pytest.mark.skipif(not REAL.is_file(), reason="the real pairs are not beside this checkout")
def test_real_pairs_are_imported_but_for_the_broken_ones(project):
    imported = run(project, "hh-rlhf", str(REAL), "data/hh")

    assert imported.read == 1500
    assert sum(imported.left_out.values()) == 1500 - imported.rows["preferences"] == 8
    assert imported.left_out == {
        "chosen: blank text": 4,
        "chosen: turns do not alternate between user and assistant, user first": 4,
    }
    assert imported.notes == []
    assert faults_of(project, "hh") == []
    with gzip.open(REAL) as file:
        first = json.loads(next(file))
    pair = table(project, "preferences", "hh")[0]
    rebuilt = "".join(
        f"\n\n{'Human' if turn['role'] == 'user' else 'Assistant'}: {turn['content']}"
        for turn in pair["prompt"]
    )
    for field in ("chosen", "rejected"):
        assert f"{rebuilt}\n\nAssistant: {pair[field]}" == first[field]


def test_the_command_imports_and_reports(project, tmp_path):
    done = project.cli("data", "import", "dpo-pairs", source(tmp_path, PAIRS), "--to", "data/mine")

    assert done.returncode == 0, done.stderr
    assert "preferences: 60 rows" in done.stdout
    # DVC's own hint would be a second one.
    assert (done.stdout + done.stderr).count("git add") == 1
    assert table(project, "preferences") == PAIRS


def test_the_command_exits_with_2_where_the_hub_is_out_of_reach(project):
    before = state_of(project)[:2]
    arguments = ("Nobody/nothing-here", "--to", "data/mine", "--revision", "abc")

    done = project.cli("data", "import", "hh-rlhf", *arguments, HF_HUB_OFFLINE="1")

    assert done.returncode == 2, done.stderr
    assert "Can't load Nobody/nothing-here" in done.stderr
    assert "Traceback" not in done.stderr
    assert state_of(project)[:2] == before
