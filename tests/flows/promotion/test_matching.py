"""Whether a scorer can judge two versions, and what a decision says."""

from __future__ import annotations

import re

import pyarrow
import pytest
from pyarrow import parquet

from flows.promotion import matching
from flows.promotion.approval import Approval, Decision
from flows.promotion.flow import _asked, judge
from flows.promotion.matching import Evaluation, Match, followed, scorer_of, why_unfair
from flows.promotion.summary import Sample, markdown
from plumbline.evaluation.scores import Interval
from plumbline.params.schema import EvaluateParams, SamplingParams
from plumbline.project import Project
from plumbline.refs import DataRef, ModelRef, PreparedData, SplitRef
from tasks.past_runs import PastRun, PastStep
from tasks.registry import Version, full_name

GOLD = "plumbline.evaluation.principles:gold_score"


def run(reward_model: str | None, method: str = "rl") -> PastRun:
    steps = {"reward_model": PastStep("s", None, reward_model)} if reward_model else {}
    params = {"alignment.method": method}
    metrics = {"eval/prompts": 16.0}
    return PastRun("r", "name", "FINISHED", "", {}, params, metrics, steps)


def match(recorded: Interval, unfair: str | None = None) -> Match:
    version = Version(
        "policy", "3", {}, ModelRef(digest="d", uri="u", mlflow_run_id="r", mlflow_model_id="m")
    )
    prompts = DataRef(digest="p", uri="u", rows=16)
    asked = Evaluation(
        EvaluateParams(), SamplingParams(), "fp32", 0, prompts, "reward model", version.model
    )
    return Match(version, None, asked, recorded, run("one"), unfair, ["There is no champion."])


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (EvaluateParams(gold=GOLD, judge=True), "gold scorer"),
        (EvaluateParams(judge=True), "judge"),
        (EvaluateParams(), "reward model"),
    ],
)
def test_who_scores_is_whom_no_training_follows_if_there_is_one(
    params: EvaluateParams, expected: str
) -> None:
    assert scorer_of(params) == expected


def test_a_reward_model_judges_only_those_who_were_trained_against_it() -> None:
    one, other, after_dpo = run("one"), run("other"), run("one", method="dpo")
    assert why_unfair("reward model", one, run("one")) is None
    assert "another one (other)" in str(why_unfair("reward model", one, other))
    assert "against none" in str(why_unfair("reward model", one, after_dpo))
    assert "its run is gone" in str(why_unfair("reward model", one, None))
    # The challenger followed none, so that none favours it.
    assert why_unfair("reward model", after_dpo, other) is None
    # Nobody follows these.
    assert why_unfair("judge", one, other) is None
    assert why_unfair("gold scorer", one, other) is None


def test_a_reward_model_of_unknown_content_is_nobodys() -> None:
    gone = run("one")._replace(steps={"reward_model": PastStep("s", None, None)})
    assert followed(gone) == "unknown"
    assert why_unfair("reward model", gone, run("one")) is not None


def test_prompts_that_the_champion_was_trained_on_are_counted(tmp_path, monkeypatch) -> None:
    def rows(name: str, *ids: str) -> DataRef:
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.table({"prompt": ids, "prompt_id": ids}), path)
        return DataRef(digest=name, uri=path.as_uri(), rows=len(ids))

    def split(name: str, train: str, test: str) -> SplitRef:
        return SplitRef(train=rows(f"{name}-train", *train), test=rows(f"{name}-test", *test))

    theirs = PreparedData(
        digest="theirs", uri="", mlflow_run_id="r",
        demonstrations=split("demonstrations", "ax", "b"),
        preferences=split("preferences", "cx", "b"), prompts=split("prompts", "cy", "bd"),
    )  # fmt: skip
    asked = match(Interval(0.7, 0.6, 0.8)).evaluation
    # The last one is not asked.
    asked = asked._replace(prompts=rows("ours", *"abcdy"), params=EvaluateParams(max_prompts=4))
    ours, champion = (
        run("one")._replace(steps={"prepare_data": PastStep("s", "k", digest)})
        for digest in ("ours", "theirs")
    )
    project = Project(tmp_path, tmp_path)
    monkeypatch.setattr(matching, "_result", lambda *asked: theirs)

    (said,) = matching._trained_on(project, ours, champion, asked)

    assert said.startswith("The champion was trained on 2 of the 4 prompts, which only the ")
    assert matching._trained_on(project, ours, ours, asked) == []
    monkeypatch.undo()
    (said,) = matching._trained_on(project, ours, champion, asked)
    assert "is gone, so it is not known" in said


def test_a_recorded_win_rate_decides_where_there_is_no_champion() -> None:
    found = judge(match(Interval(0.7, 0.6, 0.8)), 0.5, None)
    assert (found.outcome, found.champion, found.prompts) == ("promoted", None, 16)
    assert (
        "0.700 [0.600, 0.800] over the SFT model of its run on 16 held-out prompts" in found.reason
    )
    refused = judge(match(Interval(0.7, 0.6, 0.8)), 0.6, None)
    assert refused.outcome == "refused"
    assert "is not above the threshold 0.6" in refused.reason
    assert r"0.700 \[0.600, 0.800\]" in markdown(refused)
    assert "There is no champion." in markdown(refused)


def test_an_unfair_scorer_refuses_without_numbers() -> None:
    found = judge(match(Interval(0.9, 0.8, 1.0), unfair="It favours it."), 0.0, None)
    assert (found.outcome, found.reason, found.win_rate) == ("refused", "It favours it.", None)


def test_the_page_of_a_decision_shows_texts_as_they_are() -> None:
    text = "# h | ![](http://evil.example/i.png)\n\n<img src=x> [a](http://b) `c`"
    found = judge(match(Interval(0.7, 0.6, 0.8)), 0.5, None)
    sample = Sample(
        prompt=text, champion=text, champion_score=1.0, challenger=text, challenger_score=2.0
    )
    said = Approval(granted=False, by=f"Ann {text}", note=text)
    found = _asked(found.model_copy(update={"samples": [sample], "notes": [text]}), lambda _: said)

    shown = markdown(found)

    (row,) = [line for line in shown.splitlines() if line.endswith("(2.00) |")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 4
    assert not re.search(r"(?<!\\)([\[\]`#!]|<(?!br>))", shown.partition("\n")[2])
    assert {line[:2] for line in shown.splitlines() if line} == {"# ", "Ve", "- ", "| ", "|-"}


def test_a_switch_that_nobody_touched_is_a_no() -> None:
    # The form sends what was touched alone.
    assert not Decision.model_validate({"by": "Ann"}).promote
    assert Decision.model_json_schema()["required"] == ["by"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("champion", "plumbline-policy@champion"),
        ("3", "plumbline-policy/3"),
        ("mine@best", "mine@best"),
        ("mine/3", "mine/3"),
    ],
)
def test_a_bare_word_is_an_alias_and_a_bare_number_a_version(text: str, expected: str) -> None:
    assert full_name(text) == expected
