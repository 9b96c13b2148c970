"""Two models on the same prompts: who scores what, what the numbers say, and the rule."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from plumbline.data.tokenize import ChatEncoder, train_tokenizer
from plumbline.errors import ParamsError
from plumbline.evaluation.compare import Sampling, answer, sample_batches
from plumbline.evaluation.contest import (
    Judged,
    answer_table,
    contest_metrics,
    encode_again,
    model_scorer,
    passes,
    play,
    text_scorer,
)
from plumbline.evaluation.scores import Interval
from plumbline.params.schema import EvaluateParams
from plumbline.training.reporting import ignore_progress

REQUESTS = ["fold", "Where does the river end?", "Why?", "the lake", "How do I fold a napkin?"]
SAMPLING = Sampling(max_tokens=8, temperature=0.7, seed=0)


@pytest.fixture
def prompts(as_prompt: Callable[[str], str]) -> list[str]:
    return [as_prompt(text) for text in REQUESTS]


def judged(scores: list[float], texts: list[str] | None = None) -> Judged:
    count = len(scores)
    return Judged(texts or ["a b"] * count, scores, [4] * count, [True] * count)


def test_a_player_answers_and_is_scored_as_in_its_own_evaluation(
    lm: PreTrainedModel, scorer: PreTrainedModel, encoder: ChatEncoder, prompts: list[str]
) -> None:
    params = EvaluateParams(batch_size=2)
    evaluated = answer(lm, lm, scorer, encoder, prompts, SAMPLING, params, None, ignore_progress)
    done: list[tuple[int, int]] = []
    score = model_scorer(scorer, encoder, same_tokens=True)
    found = play(lm, encoder, prompts, SAMPLING, 2, score, lambda *state: done.append(state))
    assert found.texts == evaluated.texts
    assert found.scores == pytest.approx(evaluated.scores, abs=1e-6)
    assert found.lengths == evaluated.lengths
    assert found.ended == evaluated.ended
    assert done == [(2, 5), (4, 5), (5, 5)]


def test_a_scorer_of_texts_sees_each_prompt_with_its_answer(
    lm: PreTrainedModel, encoder: ChatEncoder, prompts: list[str]
) -> None:
    asked: list[tuple[str, str]] = []

    def gold(prompt: str, text: str) -> float:
        asked.append((prompt, text))
        return float(len(asked))

    found = play(lm, encoder, prompts, SAMPLING, 2, text_scorer(gold), ignore_progress)
    assert asked == list(zip(prompts, found.texts, strict=True))
    assert found.scores == [1, 2, 3, 4, 5]


def test_a_scorer_of_other_tokens_reads_the_text_in_its_own(
    lm: PreTrainedModel, scorer: PreTrainedModel, encoder: ChatEncoder, prompts: list[str]
) -> None:
    """What the answer would score had the scorer's own tokenizer written it."""
    theirs = ChatEncoder(train_tokenizer(["another text, cut in other ways"], vocab_size=300))
    (batch,) = sample_batches(lm, encoder, prompts, SAMPLING, 5)
    again = encode_again(batch, theirs)
    for row, (prompt, text, ended) in enumerate(
        zip(prompts, batch.texts, batch.responses.has_eos.tolist(), strict=True)
    ):
        response = theirs.responses([text])[0]
        if not ended and len(response) > 1:
            assert response.pop() == theirs.end_token_id
        expected = [*theirs.prompts([prompt])[0], *response]
        assert again.ids[row][again.mask[row]].tolist() == expected
    assert again.response_mask.any(1).all()
    scores = model_scorer(scorer, theirs, same_tokens=False)(batch)
    assert len(scores) == 5
    assert scores != model_scorer(scorer, theirs, same_tokens=True)(batch)


def test_an_empty_answer_that_was_cut_off_still_has_a_place_for_its_score(
    lm: PreTrainedModel, scorer: PreTrainedModel, encoder: ChatEncoder, prompts: list[str]
) -> None:
    (batch,) = sample_batches(lm, encoder, prompts[:1], SAMPLING, 1)
    silent = batch._replace(
        texts=[""], responses=batch.responses._replace(has_eos=torch.tensor([False]))
    )
    (score,) = model_scorer(scorer, encoder, same_tokens=False)(silent)
    assert score == score


def test_prompts_that_outgrow_a_models_context_are_refused(
    lm: PreTrainedModel, encoder: ChatEncoder, prompts: list[str]
) -> None:
    too_long = SAMPLING._replace(max_tokens=64)

    def score(prompt: str, text: str) -> float:
        raise AssertionError("an answer was scored")

    with pytest.raises(ParamsError, match=r"a response 64: expected at most 64 together"):
        play(copy.copy(lm), encoder, prompts, too_long, 5, text_scorer(score), ignore_progress)


def test_the_numbers_are_those_of_the_pairs() -> None:
    champion = judged([1.0, 1.0, 1.0, 1.0], ["a b", "a b", "c d", "e f"])
    challenger = judged([2.0, 3.0, 1.0, 0.5])
    found = contest_metrics(champion, challenger, samples=200, seed=0)
    assert found["contest/prompts"] == 4
    # Two wins, a tie, a loss.
    assert found["contest/win_rate"] == 0.625
    assert 0 <= found["contest/win_rate_low"] <= 0.625 <= found["contest/win_rate_high"] <= 1
    assert found["contest/gain"] == pytest.approx(0.625)
    assert found["contest/ties"] == 0.25
    assert found["contest/champion/score"] == 1
    assert found["contest/challenger/score"] == 1.625
    assert found["contest/champion/distinct_2"] == 0.75
    assert found["contest/challenger/distinct_2"] == 0.25
    assert found["contest/champion/length_mean"] == 4
    assert found["contest/challenger/ended_fraction"] == 1


def test_the_table_has_both_answers() -> None:
    rows = answer_table(["p", "q"], judged([1, 2], ["x", "y"]), judged([3, 4], ["v", "w"]), 1)
    assert rows == [
        {
            "prompt": "p",
            "champion": "x",
            "champion_score": 1,
            "challenger": "v",
            "challenger_score": 3,
        }
    ]


@pytest.mark.parametrize(
    ("low", "threshold", "expected"),
    [(0.51, 0.5, True), (0.49, 0.5, False), (0.5, 0.5, False), (0.6, 0.65, False), (0.1, 0, True)],
)
def test_the_lower_end_has_to_be_above_the_threshold(
    low: float, threshold: float, expected: bool
) -> None:
    assert passes(Interval(0.7, low, 0.9), threshold) is expected


def test_models_that_answer_alike_do_not_pass() -> None:
    same = judged([1.0, 2.0])
    wins = Interval.read(contest_metrics(same, same, 100, 0), "contest/win_rate")
    assert wins == (0.5, 0.5, 0.5)
    assert not passes(wins, 0.5)
