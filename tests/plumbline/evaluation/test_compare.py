"""Answers of a model, their numbers, and the comparison of two models' answers."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from plumbline.data.tokenize import ChatEncoder
from plumbline.evaluation.compare import (
    Answers,
    Sampling,
    answer,
    answer_repeatedly,
    compare,
    sample_table,
)
from plumbline.params.schema import EvaluateParams
from plumbline.training.reporting import ignore_progress

AsPrompt = Callable[[str], str]

REQUESTS = ["fold", "Where does the river end?", "Why?", "the lake", "How do I fold a napkin?"]
SAMPLING = Sampling(max_tokens=8, temperature=0.7, seed=0)
PARAMS = EvaluateParams(batch_size=2, bootstrap_samples=100)


@pytest.fixture
def prompts(as_prompt: AsPrompt) -> list[str]:
    return [as_prompt(text) for text in REQUESTS]


def answers_of(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    scorer: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: list[str],
    **changes: object,
) -> Answers:
    return answer(
        model, reference, scorer, encoder, prompts, SAMPLING._replace(**changes), PARAMS, None,
        ignore_progress,
    )  # fmt: skip


def test_each_prompt_gets_one_answer_and_its_numbers(
    lm: PreTrainedModel, scorer: PreTrainedModel, encoder: ChatEncoder, prompts: list[str]
) -> None:
    done: list[tuple[int, int]] = []
    asked: list[tuple[str, str]] = []

    def gold(prompt: str, text: str) -> float:
        asked.append((prompt, text))
        return float(len(asked))

    answers = answer(
        lm, lm, scorer, encoder, prompts, SAMPLING, PARAMS, gold, lambda *state: done.append(state)
    )
    assert answers.judge == []
    assert {len(column) for column in answers._replace(judge=[0.0] * 5)} == {5}
    assert asked == list(zip(prompts, answers.texts, strict=True))
    assert answers.gold == [1, 2, 3, 4, 5]
    assert done == [(2, 5), (4, 5), (5, 5)]
    assert all(1 <= length <= 8 for length in answers.lengths)
    assert all(
        ended or length == 8 for ended, length in zip(answers.ended, answers.lengths, strict=True)
    )


def test_a_model_is_at_no_distance_from_itself(
    lm: PreTrainedModel, scorer: PreTrainedModel, encoder: ChatEncoder, prompts: list[str]
) -> None:
    answers = answers_of(lm, copy.deepcopy(lm), scorer, encoder, prompts)
    assert answers.kl == pytest.approx([0] * 5, abs=1e-5)
    assert answers.gold == []


def test_kl_and_score_are_those_of_each_answer_alone(
    lm: PreTrainedModel,
    scorer: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = copy.deepcopy(lm)
    with torch.no_grad():
        reference.transformer.wte.weight.mul_(0.9)
    sampled: list[list[int]] = []
    decode = encoder.decode

    def remember(responses: list[list[int]]) -> list[str]:
        sampled.extend(responses)
        return decode(responses)

    monkeypatch.setattr(encoder, "decode", remember)
    answers = answers_of(lm, reference, scorer, encoder, prompts)
    for row, query in enumerate(encoder.prompts(prompts)):
        sequence = [*query, *sampled[row]]
        ids = torch.tensor([sequence])
        with torch.no_grad():
            ours, theirs = (
                torch.log_softmax(model(input_ids=ids).logits[0].double() / 0.7, -1)
                for model in (lm, reference)
            )
            score = (
                scorer.base_model(input_ids=ids).last_hidden_state[0, -1] @ (scorer.score.weight[0])
            )
        kl = math.fsum(
            float((ours - theirs)[t - 1, sequence[t]]) for t in range(len(query), len(sequence))
        )
        assert answers.kl[row] == pytest.approx(kl, abs=1e-4)
        assert answers.scores[row] == pytest.approx(float(score), abs=1e-4)
        assert answers.lengths[row] == len(sampled[row])


def test_the_seed_decides_the_answers(
    lm: PreTrainedModel, scorer: PreTrainedModel, encoder: ChatEncoder, prompts: list[str]
) -> None:
    first, again, other = (
        answers_of(lm, lm, scorer, encoder, prompts, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.texts != other.texts


def test_the_judge_scores_the_same_answers(
    lm: PreTrainedModel, scorer: PreTrainedModel, encoder: ChatEncoder, prompts: list[str]
) -> None:
    judge = copy.deepcopy(scorer)
    with torch.no_grad():
        judge.score.weight.mul_(-2)
    plain = answers_of(lm, lm, scorer, encoder, prompts)
    judged = answer(
        lm, lm, scorer, encoder, prompts, SAMPLING, PARAMS, None, ignore_progress, judge
    )
    assert judged.judge == pytest.approx([-2 * score for score in plain.scores], abs=1e-5)
    assert judged._replace(judge=[]) == plain


def test_repeated_answers_are_scored_prompt_by_prompt(
    lm: PreTrainedModel, scorer: PreTrainedModel, encoder: ChatEncoder, prompts: list[str]
) -> None:
    done: list[tuple[int, int]] = []
    asked: list[tuple[str, str]] = []

    def gold(prompt: str, text: str) -> float:
        asked.append((prompt, text))
        return float(len(asked))

    judge = copy.deepcopy(scorer)
    with torch.no_grad():
        judge.score.weight.mul_(-2)
    # Batches of 2 run over the borders between the prompts.
    repeated = answer_repeatedly(
        lm, scorer, encoder, prompts, 3, SAMPLING, PARAMS, gold,
        lambda *state: done.append(state), judge,
    )  # fmt: skip
    assert repeated.gold is not None
    assert repeated.judge is not None
    assert repeated.scores.shape == (5, 3)
    assert repeated.gold.tolist() == [[3.0 * row + k for k in (1, 2, 3)] for row in range(5)]
    assert repeated.judge == pytest.approx(-2 * repeated.scores, abs=1e-5)
    assert [prompt for prompt, _ in asked] == [prompt for prompt in prompts for _ in range(3)]
    assert len({text for _, text in asked}) > 10
    assert (done[0], done[-1]) == ((2, 15), (15, 15))


def test_repeated_answers_are_those_of_the_same_prompts_in_a_row(
    lm: PreTrainedModel, scorer: PreTrainedModel, encoder: ChatEncoder, prompts: list[str]
) -> None:
    repeated = answer_repeatedly(
        lm, scorer, encoder, prompts, 2, SAMPLING, PARAMS, None, ignore_progress
    )
    in_a_row = [prompt for prompt in prompts for _ in range(2)]
    assert (
        repeated.scores.flatten().tolist() == answers_of(lm, lm, scorer, encoder, in_a_row).scores
    )
    assert (repeated.gold, repeated.judge) == (None, None)


SFT = Answers(
    texts=["a b", "a b", "c d", "e"],
    scores=[0.0, 1.0, 2.0, 3.0],
    gold=[0.0, 0.5, 1.0, 0.5],
    judge=[3.0, 1.0, 2.0, 2.0],
    kl=[0.0, 0.0, 0.0, 0.0],
    lengths=[2, 4, 6, 8],
    ended=[True, True, True, False],
)
POLICY = Answers(
    texts=["a b", "a b", "a b", "a b"],
    scores=[1.0, 1.0, 1.0, 4.0],
    gold=[1.0, 1.0, 1.0, 1.0],
    judge=[2.0, 2.0, 2.0, 0.0],
    kl=[1.0, 2.0, 3.0, 4.0],
    lengths=[3, 3, 3, 3],
    ended=[True, True, True, True],
)


def test_compare_by_hand() -> None:
    metrics = compare(SFT, POLICY, PARAMS, seed=0)
    expected = {
        "eval/prompts": 4,
        "eval/sft/score": 1.5,
        "eval/policy/score": 1.75,
        "eval/sft/gold": 0.5,
        "eval/policy/gold": 1,
        "eval/sft/kl": 0,
        "eval/policy/kl": 2.5,
        "eval/sft/length_mean": 5,
        "eval/policy/length_mean": 3,
        "eval/sft/ended_fraction": 0.75,
        "eval/policy/ended_fraction": 1,
        "eval/sft/distinct_1": 5 / 7,
        "eval/sft/distinct_2": 2 / 3,
        "eval/policy/distinct_1": 2 / 8,
        "eval/policy/distinct_2": 1 / 4,
        "eval/sft/score_length_correlation": 1,
        "eval/policy/score_length_correlation": 0,
        "eval/win_rate": (1 + 0.5 + 0 + 1) / 4,
        "eval/gold_win_rate": (1 + 1 + 0.5 + 1) / 4,
        "eval/sft/judge": 2,
        "eval/policy/judge": 1.5,
        "eval/judge_win_rate": (0 + 1 + 0.5 + 0) / 4,
        "eval/score_gain": 0.25,
        "eval/gold_gain": 0.5,
        "eval/judge_gain": -0.5,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value), name
    for name in (
        "eval/win_rate", "eval/gold_win_rate", "eval/judge_win_rate", "eval/policy/kl",
        "eval/sft/gold", "eval/policy/judge", "eval/score_gain", "eval/gold_gain",
        "eval/judge_gain",
    ):  # fmt: skip
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
    assert compare(SFT, POLICY, PARAMS, seed=0) == metrics


@pytest.mark.parametrize("column", ["gold", "judge"])
def test_a_scorer_that_is_not_there_has_no_metrics(column: str) -> None:
    absent: dict[str, list[float]] = {column: []}
    metrics = compare(SFT._replace(**absent), POLICY._replace(**absent), PARAMS, seed=0)
    assert not [name for name in metrics if column in name]
    assert "eval/win_rate_low" in metrics
    assert {"eval/gold_gain", "eval/judge_gain"} - {f"eval/{column}_gain"} <= set(metrics)


def test_gains_are_paired() -> None:
    policy = SFT._replace(scores=[score + 1 for score in SFT.scores])
    metrics = compare(SFT, policy, PARAMS, seed=0)
    assert metrics["eval/score_gain_low"] == metrics["eval/score_gain_high"] == 1


def test_the_table_shows_the_first_prompts() -> None:
    table = sample_table(["p", "q", "r", "s"], SFT, POLICY, rows=2)
    assert [row["prompt"] for row in table] == ["p", "q"]
    assert table[1] == {
        "prompt": "q",
        "sft": "a b",
        "sft_score": 1.0,
        "sft_gold": 0.5,
        "sft_judge": 1.0,
        "policy": "a b",
        "policy_score": 1.0,
        "policy_gold": 1.0,
        "policy_judge": 2.0,
    }


def test_the_table_of_few_prompts_is_short() -> None:
    alone = (model._replace(gold=[], judge=[]) for model in (SFT, POLICY))
    table = sample_table(["p"], *alone, rows=40)
    assert [set(row) for row in table] == [{"prompt", "sft", "sft_score", "policy", "policy_score"}]
