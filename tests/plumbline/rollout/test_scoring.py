"""What a response earns: the reward model, Python functions, clipping, a missing end."""

import copy
import json
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plumbline.errors import ParamsError, TrainingError
from plumbline.params.schema import RLParams
from plumbline.rollout.experience import Sequences
from plumbline.rollout.generate import Responses
from plumbline.rollout.scoring import Scores, load_rewards, score_responses

PAD, EOS = 0, 1
QUERIES = [[7, 9, 250], [8], [44, 6, 5], [99, 3]]
ANSWERS = [[12, 40, EOS], [200], [17, EOS], [5, 77, 140, 63]]
HAS_EOS = torch.tensor([True, False, True, False])
PROMPTS = [json.dumps([{"role": "user", "content": text}]) for text in ("a", "bb", "ccc", "dddd")]
TEXTS = ["one", "three", "sixteen", ""]
LENGTHS = [3.0, 5.0, 7.0, 0.0]
ENDED: dict[str, Any] = {"missing_eos": "subtract", "missing_eos_score": 0.0}
"""No treatment of a missing end."""


def joined() -> Sequences:
    width = max(map(len, ANSWERS))
    mask = torch.tensor([[t < len(answer) for t in range(width)] for answer in ANSWERS])
    ids = torch.tensor([[*answer, *[PAD] * (width - len(answer))] for answer in ANSWERS])
    return Sequences.join(QUERIES, Responses(ids, mask, HAS_EOS, torch.zeros(mask.shape)), PAD)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with two reward functions."""
    module = ModuleType("toy_rewards")
    module.length = lambda _, text: len(text)  # type: ignore[attr-defined]
    module.asked = lambda prompt, _: float(len(json.loads(prompt)[0]["content"]))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_rewards", module)
    return module


@pytest.fixture
def other_scorer(shared_scorer: PreTrainedModel) -> PreTrainedModel:
    judge = copy.deepcopy(shared_scorer)
    with torch.no_grad():
        judge.score.weight.neg_()
    return judge


def score(scorer: PreTrainedModel, judge: PreTrainedModel | None = None, **changes: Any) -> Scores:
    params = RLParams(**{**ENDED, **changes})
    return score_responses(
        scorer, judge, load_rewards(params), joined(), HAS_EOS, PROMPTS, TEXTS, params
    )


def naive_scores(model: PreTrainedModel) -> list[float]:
    scores = []
    for query, answer in zip(QUERIES, ANSWERS, strict=True):
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([[*query, *answer]]))
            scores.append(float(hidden.last_hidden_state[0, -1] @ model.score.weight[0]))
    return scores


def near(values: list[float]) -> Any:
    return pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("micro_batch_tokens", [1, 4096])
def test_the_score_is_the_reward_models(scorer: PreTrainedModel, micro_batch_tokens: int) -> None:
    scores = score(scorer, micro_batch_tokens=micro_batch_tokens)
    assert scores.total.tolist() == near(naive_scores(scorer))
    assert set(scores.parts) == {"reward_model"}
    assert scores.total.dtype == torch.float32


def test_the_reward_model_has_a_weight(scorer: PreTrainedModel) -> None:
    scores = score(scorer, reward_model_weight=2.5)
    raw = naive_scores(scorer)
    assert scores.total.tolist() == near([2.5 * value for value in raw])
    assert scores.parts["reward_model"].tolist() == near(raw)


def test_the_reward_models_score_is_cut_on_both_sides_before_its_weight(
    scorer: PreTrainedModel, other_scorer: PreTrainedModel
) -> None:
    # The other one says the opposite, so that high and low scores are cut.
    for model in (scorer, other_scorer):
        raw = naive_scores(model)
        limit = sorted(abs(value) for value in raw)[1] * 1.01
        scores = score(model, score_clip=limit, reward_model_weight=2.0)
        cut = [min(max(value, -limit), limit) for value in raw]
        assert cut != raw
        assert scores.total.tolist() == near([2 * value for value in cut])
        assert scores.parts["reward_model"].tolist() == near(raw)


def test_functions_are_weighed_and_added(scorer: PreTrainedModel, toy: ModuleType) -> None:
    scores = score(scorer, rewards={"toy_rewards:length": 0.5, "toy_rewards.asked": -2.0})
    raw = naive_scores(scorer)
    # Lengths 3, 5, 7, 0 of the responses, and 1, 2, 3, 4 of what was asked.
    expected = [-0.5, -1.5, -2.5, -8]
    assert scores.total.tolist() == near([a + b for a, b in zip(raw, expected, strict=True)])
    assert scores.parts["reward_length"].tolist() == LENGTHS
    assert scores.parts["reward_asked"].tolist() == [1, 2, 3, 4]


def test_functions_are_neither_cut_nor_scaled(scorer: PreTrainedModel, toy: ModuleType) -> None:
    scores = score(
        scorer, score_clip=0.25, reward_model_weight=0.0, rewards={"toy_rewards:length": 1.0}
    )
    assert scores.total.tolist() == LENGTHS


def test_a_function_of_weight_0_is_read_and_changes_no_bit(
    scorer: PreTrainedModel, toy: ModuleType
) -> None:
    plain, watched = score(scorer), score(scorer, rewards={"toy_rewards:length": 0.0})
    assert torch.equal(plain.total, watched.total)
    assert watched.parts["reward_length"].tolist() == LENGTHS


def test_a_judge_looks_on(scorer: PreTrainedModel, other_scorer: PreTrainedModel) -> None:
    plain, watched = score(scorer), score(scorer, other_scorer)
    assert torch.equal(plain.total, watched.total)
    assert watched.parts["judge"].tolist() == near(naive_scores(other_scorer))
    assert watched.parts["judge"].tolist() != near(naive_scores(scorer))


@pytest.mark.parametrize(
    ("treatment", "constant", "expected"),
    # The responses 1 and 3 have no end token.
    [
        ("replace", -1.5, [3, -1.5, 7, -1.5]),
        ("replace", 2.0, [3, 2, 7, 2]),
        ("subtract", 1.5, [3, 3.5, 7, -1.5]),
    ],
)
def test_a_missing_end_is_treated_last(
    scorer: PreTrainedModel, toy: ModuleType, treatment: str, constant: float, expected: list[float]
) -> None:
    scores = score(
        scorer, reward_model_weight=0.0, rewards={"toy_rewards:length": 1.0},
        missing_eos=treatment, missing_eos_score=constant,
    )  # fmt: skip
    assert scores.total.tolist() == expected
    assert scores.parts["reward_length"].tolist() == LENGTHS


@pytest.mark.parametrize(
    "number", [2, 2.0, True + 1, torch.tensor(2.0), np.float32(2), torch.tensor([[2]])]
)
def test_any_number_will_do(scorer: PreTrainedModel, toy: ModuleType, number: Any) -> None:
    toy.length = lambda *_: number
    scores = score(scorer, reward_model_weight=0.0, rewards={"toy_rewards:length": 1.0})
    assert scores.total.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    "returned",
    [
        math.nan, math.inf, -math.inf, None, "good", "3.5", b"3", [1.0, 2.0], [],
        torch.tensor([1.0, 2.0]), np.array([1.0, 2.0]), torch.tensor(math.nan), 10**400, 1j,
    ],
)  # fmt: skip
def test_what_is_no_finite_number_names_the_function(
    scorer: PreTrainedModel, toy: ModuleType, returned: Any
) -> None:
    toy.asked = lambda *_: returned
    with pytest.raises(
        TrainingError, match=r"rl\.rewards: expected a finite number from toy_rewards\.asked, got"
    ):
        score(scorer, rewards={"toy_rewards:length": 1.0, "toy_rewards.asked": 0.0})


def test_functions_read_each_prompt_with_its_response(
    scorer: PreTrainedModel, toy: ModuleType
) -> None:
    seen: list[tuple[str, str]] = []

    def remember(prompt: str, text: str) -> float:
        seen.append((prompt, text))
        return 0.0

    toy.length = remember
    score(scorer, rewards={"toy_rewards:length": 1.0})
    assert seen == list(zip(PROMPTS, TEXTS, strict=True))


def test_functions_are_loaded_by_their_names(toy: ModuleType) -> None:
    loaded = load_rewards(RLParams(rewards={"toy_rewards:length": 1.0, "toy_rewards.asked": 0.0}))
    assert loaded == {"toy_rewards:length": toy.length, "toy_rewards.asked": toy.asked}
    with pytest.raises(ParamsError, match=r"rl\.rewards: .*toy_rewards:nothing"):
        load_rewards(RLParams(rewards={"toy_rewards:nothing": 1.0}))


def test_scores_do_not_depend_on_the_order(scorer: PreTrainedModel, toy: ModuleType) -> None:
    params = RLParams(rewards={"toy_rewards:length": 1.0}, missing_eos_score=-2.0)
    functions: dict[str, Callable[[str, str], float]] = load_rewards(params)

    def total(order: list[int]) -> Tensor:
        return score_responses(
            scorer, None, functions, joined().rows(torch.tensor(order)), HAS_EOS[order],
            [PROMPTS[i] for i in order], [TEXTS[i] for i in order], params,
        ).total  # fmt: skip

    order = [2, 0, 3, 1]
    torch.testing.assert_close(total(order), total([0, 1, 2, 3])[order], atol=1e-4, rtol=0)
