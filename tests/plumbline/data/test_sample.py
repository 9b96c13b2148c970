"""The sample data: its determinism, its shares, and answers that break what they are said to."""

import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from plumbline.data import phrases, sample
from plumbline.data.splits import prompt_id, split_of
from plumbline.evaluation.principles import gold_score, principles
from plumbline.params.schema import DataParams

AsPrompt = Callable[[str], str]
Tables = dict[str, list[dict[str, Any]]]

FILES = ("demonstrations", "preferences", "prompts")


def read(folder: Path) -> Tables:
    return {
        name: [
            json.loads(line)
            for line in (folder / f"{name}.jsonl").read_text("utf-8").split("\n")[:-1]
        ]
        for name in FILES
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "new" / "folder"
    sample.write_sample(path)
    return path


@pytest.fixture(scope="module")
def tables(folder: Path) -> Tables:
    return read(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    sample.write_sample(tmp_path)
    assert contents(tmp_path) == contents(folder)
    assert set(contents(folder)) == {f"{name}.jsonl" for name in FILES}


def test_another_seed_writes_other_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "DEMONSTRATIONS", 20)
    monkeypatch.setattr(sample, "PREFERENCES", 20)
    monkeypatch.setattr(sample, "PROMPTS", 20)
    sample.write_sample(tmp_path, seed=1)
    for name, rows in read(tmp_path).items():
        assert rows != read(folder)[name][:20]


def test_more_rows_in_one_file_leave_the_others_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "DEMONSTRATIONS", 10)
    sample.write_sample(tmp_path)
    shorter, whole = contents(tmp_path), contents(folder)
    assert shorter["preferences.jsonl"] == whole["preferences.jsonl"]
    assert shorter["prompts.jsonl"] == whole["prompts.jsonl"]
    assert whole["demonstrations.jsonl"].startswith(shorter["demonstrations.jsonl"])


def test_the_files_have_the_rows_and_fields_promised(tables: Tables) -> None:
    assert {name: len(rows) for name, rows in tables.items()} == {
        "demonstrations": sample.DEMONSTRATIONS,
        "preferences": sample.PREFERENCES,
        "prompts": sample.PROMPTS,
    }
    fields = {
        "demonstrations": {"prompt", "response"},
        "preferences": {"prompt", "chosen", "rejected", "clean"},
        "prompts": {"prompt"},
    }
    for name, rows in tables.items():
        assert all(set(row) == fields[name] for row in rows)


def test_no_row_comes_twice(tables: Tables) -> None:
    distinct = {
        "demonstrations": {(row["prompt"], row["response"]) for row in tables["demonstrations"]},
        # The same pair in both orders counts as one.
        "preferences": {
            (row["prompt"], frozenset((row["chosen"], row["rejected"])))
            for row in tables["preferences"]
        },
        "prompts": {row["prompt"] for row in tables["prompts"]},
    }
    assert {name: len(rows) for name, rows in distinct.items()} == {
        name: len(rows) for name, rows in tables.items()
    }
    assert all(row["chosen"] != row["rejected"] for row in tables["preferences"])


def test_every_split_of_every_file_has_rows(tables: Tables, as_prompt: AsPrompt) -> None:
    fraction = DataParams().test_fraction
    for name, rows in tables.items():
        splits = [split_of(prompt_id(as_prompt(row["prompt"])), fraction) for row in rows]
        held_out = splits.count("test") / len(rows)
        assert abs(held_out - fraction) < 0.04, name


def test_a_stated_share_of_the_labels_is_flipped(tables: Tables) -> None:
    rows = tables["preferences"]
    noisy = sum(not row["clean"] for row in rows) / len(rows)
    # Four standard errors of a share.
    error = (sample.LABEL_NOISE * (1 - sample.LABEL_NOISE) / len(rows)) ** 0.5
    assert abs(noisy - sample.LABEL_NOISE) < 4 * error


def test_a_label_is_clean_where_the_better_answer_is_chosen(
    tables: Tables, as_prompt: AsPrompt
) -> None:
    for row in tables["preferences"]:
        prompt = as_prompt(row["prompt"])
        better = gold_score(prompt, row["chosen"]) > gold_score(prompt, row["rejected"])
        assert better == row["clean"], row


def test_ratings_are_good_where_nothing_is_broken_but_for_the_noise(as_prompt: AsPrompt) -> None:
    rows = list(islice(sample.ratings(random.Random(0)), 2000))
    assert set(rows[0]) == {"prompt", "response", "label"}
    assert len({(row["prompt"], row["response"]) for row in rows}) == 2000
    gold = [gold_score(as_prompt(str(row["prompt"])), str(row["response"])) for row in rows]
    flipped = sum((score == 1) != row["label"] for score, row in zip(gold, rows, strict=True))
    # Four standard errors of a share.
    error = (sample.LABEL_NOISE * (1 - sample.LABEL_NOISE) / 2000) ** 0.5
    assert abs(flipped / 2000 - sample.LABEL_NOISE) < 4 * error
    assert 0.4 < sum(bool(row["label"]) for row in rows) / 2000 < 0.6


def test_demonstrations_are_of_mixed_quality(tables: Tables, as_prompt: AsPrompt) -> None:
    rows = tables["demonstrations"]
    scores = [gold_score(as_prompt(row["prompt"]), row["response"]) for row in rows]
    for score, share in zip((1.0, 0.5, 0.0), sample.BROKEN_SHARES, strict=True):
        # Answers that keep everything are fewer, so more of them come twice and are dropped.
        assert abs(scores.count(score) / len(rows) - share) < 0.06


@pytest.mark.parametrize("misfits", [False, True])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_an_answer_breaks_exactly_as_many_principles_as_asked(
    broken: int, misfits: bool, as_prompt: AsPrompt
) -> None:
    rng = random.Random(broken)
    for _ in range(1500):
        request = sample.sample_request(rng)
        answer = sample.sample_answer(rng, request, broken, misfits=misfits)
        kept = principles(as_prompt(request.prompt), answer)
        assert kept.count(False) == broken, (request.prompt, answer, kept)


def test_requests_are_of_all_kinds_in_the_shares_stated() -> None:
    assert sum(sample.KIND_SHARES.values()) == pytest.approx(1)
    assert set(sample.KIND_SHARES) == set(phrases.REQUESTS)
    rng = random.Random(0)
    kinds = [sample.sample_request(rng).kind for _ in range(4000)]
    for kind, share in sample.KIND_SHARES.items():
        assert abs(kinds.count(kind) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_each_principle_is_broken_somewhere(tables: Tables, as_prompt: AsPrompt) -> None:
    broken = {
        name
        for row in tables["demonstrations"]
        for name, kept in principles(as_prompt(row["prompt"]), row["response"])._asdict().items()
        if not kept
    }
    assert broken == {"helpful", "honest", "respectful", "harmless", "private"}


def test_no_placeholder_is_left(tables: Tables) -> None:
    for rows in tables.values():
        for row in rows:
            for value in row.values():
                assert not isinstance(value, str) or not set("{}") & set(value)
                assert not isinstance(value, str) or value == " ".join(value.split())
