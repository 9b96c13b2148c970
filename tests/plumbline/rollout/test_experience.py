"""Log-probs, hidden states, values and scores of a padded batch against each sequence alone."""

import pytest
import torch
from transformers import PreTrainedModel

from plumbline.rollout.experience import (
    Sequences,
    response_logprobs,
    response_states,
    response_values,
    score_sequences,
)
from plumbline.rollout.generate import Responses

PAD, EOS = 0, 1
QUERIES = [[7, 9, 250], [8], [44, EOS, 5, 30, 61, 12], [99, 3]]
ANSWERS = [[12, 40, EOS], [200], [17, EOS], [5, 77, 140, 63, 29]]


def as_responses(answers: list[list[int]], pad: int = PAD) -> Responses:
    width = max(map(len, answers))
    return Responses(
        torch.tensor([[*answer, *[pad] * (width - len(answer))] for answer in answers]),
        torch.tensor([[t < len(answer) for t in range(width)] for answer in answers]),
        torch.tensor([answer[-1] == EOS for answer in answers]),
        torch.zeros(len(answers), width),
    )


@pytest.fixture(params=[PAD, EOS])
def joined(request: pytest.FixtureRequest) -> Sequences:
    return Sequences.join(QUERIES, as_responses(ANSWERS, request.param), request.param)


def test_queries_are_padded_left_and_responses_right() -> None:
    joined = Sequences.join([[7, 9], [8]], as_responses([[12, EOS], [5]]), PAD)
    assert joined.ids.tolist() == [[7, 9, 12, EOS], [PAD, 8, 5, PAD]]
    assert joined.mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 0]]
    assert joined.response_mask.tolist() == [[1, 1], [1, 0]]
    assert joined.response_ids.tolist() == [[12, EOS], [5, PAD]]


def test_rows_drop_the_columns_that_pad_them_all(joined: Sequences) -> None:
    part = joined.rows(torch.tensor([1, 0]))
    pad = int(joined.ids[1, 0])
    assert part.ids.tolist() == [[pad, pad, 8, 200, pad, pad], [7, 9, 250, 12, 40, EOS]]
    assert part.mask.tolist() == [[0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert part.response_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert part.response_ids.tolist() == [[200, pad, pad], [12, 40, EOS]]


def test_rows_of_everything_change_nothing(joined: Sequences) -> None:
    for ours, theirs in zip(joined.rows(slice(0, 4)), joined, strict=True):
        assert torch.equal(ours, theirs)


def naive_logprobs(
    model: PreTrainedModel, query: list[int], answer: list[int], temperature: float
) -> list[float]:
    """Log-prob of each token of the answer, from the unpadded sequence."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*query, *answer]])).logits[0].double()
    logp = torch.log_softmax(logits / temperature, -1)
    return [float(logp[len(query) - 1 + t, token]) for t, token in enumerate(answer)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_padding_changes_no_logprob(
    lm: PreTrainedModel, joined: Sequences, temperature: float
) -> None:
    with torch.no_grad():
        logprobs = response_logprobs(lm, joined, temperature)
    assert logprobs.shape == joined.response_mask.shape
    for row, (query, answer) in enumerate(zip(QUERIES, ANSWERS, strict=True)):
        expected = naive_logprobs(lm, query, answer, temperature)
        assert logprobs[row, : len(answer)].tolist() == pytest.approx(expected, abs=1e-5)


def test_every_family_has_its_logprobs(family_lm: PreTrainedModel, joined: Sequences) -> None:
    with torch.no_grad():
        logprobs = response_logprobs(family_lm, joined, 0.8)
    for row, (query, answer) in enumerate(zip(QUERIES, ANSWERS, strict=True)):
        expected = naive_logprobs(family_lm, query, answer, 0.8)
        assert logprobs[row, : len(answer)].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_micro_batch_has_the_logprobs_of_the_whole(
    lm: PreTrainedModel, joined: Sequences
) -> None:
    with torch.no_grad():
        whole = response_logprobs(lm, joined, 1.0)
        part = joined.rows(torch.tensor([2, 0]))
        few = response_logprobs(lm, part, 1.0)
    torch.testing.assert_close(
        few[part.response_mask], whole[[2, 0], :3][part.response_mask], atol=1e-5, rtol=0
    )


def test_the_policy_learns_from_logprobs(lm: PreTrainedModel, joined: Sequences) -> None:
    assert response_logprobs(lm, joined, 1.0).requires_grad


def test_hidden_states_are_those_behind_the_logits(
    family_lm: PreTrainedModel, joined: Sequences
) -> None:
    with torch.no_grad():
        hidden, is_linear = response_states(family_lm, joined)
        assert is_linear
        assert hidden.shape == (int(joined.response_mask.sum()), 32)
        rows = hidden.split([len(answer) for answer in ANSWERS])
        for mine, query, answer in zip(rows, QUERIES, ANSWERS, strict=True):
            # Before each token of the answer, of the sequence alone.
            ids = torch.tensor([[*query, *answer]])
            at = slice(len(query) - 1, len(query) + len(answer) - 1)
            last = family_lm.base_model(input_ids=ids).last_hidden_state[0, at]
            torch.testing.assert_close(mine, last, atol=1e-4, rtol=0)


def test_hidden_states_lead_back_to_the_trunk(lm: PreTrainedModel, joined: Sequences) -> None:
    response_states(lm, joined).hidden.sum().backward()
    assert all(weight.grad is not None for weight in lm.transformer.h.parameters())


def naive_value(model: PreTrainedModel, sequence: list[int]) -> float:
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0, -1]
        return float(hidden @ model.score.weight[0])


def test_a_value_is_read_before_its_token(scorer: PreTrainedModel, joined: Sequences) -> None:
    values = response_values(scorer, joined)
    assert values.shape == joined.response_mask.shape
    for row, (query, answer) in enumerate(zip(QUERIES, ANSWERS, strict=True)):
        expected = [naive_value(scorer, [*query, *answer[:t]]) for t in range(len(answer))]
        assert values[row, : len(answer)].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("max_tokens", [1, 14, None])
def test_a_score_is_read_at_the_last_real_token(
    scorer: PreTrainedModel, joined: Sequences, max_tokens: int | None
) -> None:
    scores = score_sequences(scorer, joined, max_tokens)
    expected = [naive_value(scorer, [*q, *a]) for q, a in zip(QUERIES, ANSWERS, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)
    assert not scores.requires_grad


def test_scores_follow_the_order_of_the_sequences(
    scorer: PreTrainedModel, joined: Sequences
) -> None:
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(
        score_sequences(scorer, joined.rows(order), 10),
        score_sequences(scorer, joined, 10)[order],
        atol=1e-4,
        rtol=0,
    )


def test_numbers_of_response_tokens_are_put_in_their_places(joined: Sequences) -> None:
    spread = joined.spread(torch.arange(1.0, 12.0))
    assert spread.tolist() == [
        [1, 2, 3, 0, 0],
        [4, 0, 0, 0, 0],
        [5, 6, 0, 0, 0],
        [7, 8, 9, 10, 11],
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_a_group_takes_at_most_so_many_tokens_with_its_padding(packed: bool) -> None:
    queries = [[5] * 20, [5] * 2, [5] * 3, [5] * 19]
    said = torch.tensor([2, 20, 19, 3])
    mask = torch.arange(20) < said.unsqueeze(1)
    responses = Responses(mask.long(), mask, mask[:, 0], torch.zeros(mask.shape))
    joined = Sequences.join(queries, responses, 0)
    groups = joined.micro_batches(50, packed=packed)
    assert sorted(torch.cat(groups).tolist()) == [0, 1, 2, 3]
    for group in groups:
        part = joined.rows(group)
        assert int(part.mask.sum() if packed else part.ids.numel()) <= 50
    assert len(groups) == (2 if packed else 3)
