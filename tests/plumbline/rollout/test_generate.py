"""Sampling: what is drawn, from which distribution, and where a response ends."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, GPT2Config, PreTrainedModel

from plumbline.rollout import cache, generate
from plumbline.rollout.generate import Responses, sample_responses

PAD, EOS = 0, 1


def draw(
    model: Any,
    queries: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    stops: Sequence[int] = (EOS,),
    pad: int = PAD,
) -> Responses:
    return sample_responses(
        model,
        queries,
        max_tokens=max_tokens,
        stop_token_ids=stops,
        pad_token_id=pad,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    )


class Scripted:
    """Answers each query, known by its last token, with a line of a script.

    It reads off its cache which query a row is of, and remembers what it was given.
    """

    device = torch.device("cpu")
    config = GPT2Config(n_layer=1)

    def __init__(self, script: dict[int, list[int]]) -> None:
        self.script = script
        self.calls: list[dict[str, Any]] = []
        self.width = 0

    def __call__(self, past_key_values: Cache, **inputs: Any) -> SimpleNamespace:
        ids = inputs["input_ids"]
        self.width = self.width or ids.shape[1]
        states = ids[:, None, :, None].float()
        seen, _ = past_key_values.update(states, states, 0)
        step = seen.shape[2] - self.width
        asked = seen[:, 0, self.width - 1, 0].long().tolist()
        said = torch.tensor([self.script[query][step] for query in asked])
        self.calls.append({k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)})
        logits = torch.nn.functional.one_hot(said, 10).float() * 1e4
        return SimpleNamespace(logits=logits.unsqueeze(1))


def answering(*lines: list[int]) -> tuple[Scripted, list[list[int]]]:
    """A model, with a query for each line of its script."""
    queries = [[3, 20 + row] for row in range(len(lines))]
    return Scripted({query[-1]: line for query, line in zip(queries, lines, strict=True)}), queries


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_a_response_ends_with_its_first_end_token(pad: int) -> None:
    model = answering([5, EOS, 7, 7], [6, 7, 8, EOS], [EOS, 5, 5, EOS], [9, 9, 9, 9])
    responses = draw(*model, max_tokens=4, pad=pad)
    assert responses.ids.tolist() == [
        [5, EOS, pad, pad],
        [6, 7, 8, EOS],
        [EOS, pad, pad, pad],
        [9, 9, 9, 9],
    ]
    assert responses.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert responses.has_eos.tolist() == [True, True, True, False]
    assert responses.lists() == [[5, EOS], [6, 7, 8, EOS], [EOS], [9, 9, 9, 9]]


def test_each_stop_token_ends_a_response() -> None:
    # A chat model may end a turn with one token and a document with another.
    model = answering([5, 7, EOS, 9], [6, EOS, 7, 9], [5, 5, 5, 5], [7, EOS, 5, 5])
    responses = draw(*model, max_tokens=4, stops=(EOS, 7))
    assert responses.lists() == [[5, 7], [6, EOS], [5, 5, 5, 5], [7]]
    assert responses.has_eos.tolist() == [True, True, False, True]


def test_a_stop_token_at_the_limit_ends_its_response() -> None:
    responses = draw(*answering([5, 6, EOS], [5, 6, 7]), max_tokens=3)
    assert responses.lists() == [[5, 6, EOS], [5, 6, 7]]
    assert responses.has_eos.tolist() == [True, False]


def test_a_pad_token_that_is_said_counts() -> None:
    responses = draw(*answering([5, PAD, EOS]), max_tokens=3)
    assert responses.lists() == [[5, PAD, EOS]]


def test_sampling_stops_when_all_have_ended() -> None:
    model, queries = answering([5, EOS, 7, 7, 7], [EOS, 7, 7, 7, 7])
    responses = draw(model, queries, max_tokens=5)
    assert len(model.calls) == 2
    assert responses.ids.shape == (2, 2)


def test_sampling_stops_at_the_limit() -> None:
    responses = draw(*answering([5, 6, 7, 8]), max_tokens=3)
    assert (responses.lists(), responses.has_eos.tolist()) == ([[5, 6, 7]], [False])


def test_the_model_sees_positions_and_masks_of_real_tokens() -> None:
    model = Scripted({3: [5, 6, 7], 4: [6, 7, 8]})
    draw(model, [[3, 4, 3], [4]], max_tokens=3)
    positions = [call["position_ids"].tolist() for call in model.calls]
    assert positions == [[[0, 1, 2], [0, 0, 0]], [[3], [1]], [[4], [2]]]
    masks = [call["attention_mask"].tolist() for call in model.calls]
    assert masks == [[[1] * (3 + t), [0, 0] + [1] * (1 + t)] for t in range(3)]
    inputs = [call["input_ids"].tolist() for call in model.calls]
    assert inputs == [[[3, 4, 3], [PAD, PAD, 4]], [[5], [6]], [[6], [7]]]


def greedy(model: PreTrainedModel, query: list[int], max_tokens: int) -> list[int]:
    """The likeliest continuation, without batch, padding or cache."""
    ids = list(query)
    for _ in range(max_tokens):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(query) :]


def test_a_batch_of_queries_is_answered_as_each_alone(
    lm: PreTrainedModel, sequences: list[list[int]]
) -> None:
    # At a temperature near 0 sampling is greedy, so that nothing is left to chance.
    responses = draw(lm, sequences, max_tokens=12, temperature=1e-6)
    expected = [greedy(lm, sequence, 12) for sequence in sequences]
    assert responses.lists() == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_tokens_come_from_the_softmax_of_the_scaled_logits(
    lm: PreTrainedModel, temperature: float
) -> None:
    query, count = [7, 30], 20_000
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([query])).logits[0, -1].double()
    expected = torch.softmax(logits / temperature, -1) * count
    tokens = torch.cat(
        [
            draw(lm, [query] * 4000, max_tokens=1, temperature=temperature, seed=seed).ids[:, 0]
            for seed in range(5)
        ]
    )
    observed = torch.bincount(tokens, minlength=300).double()
    # Tokens expected less than 5 times are counted together, as Pearson's test asks.
    rare = expected < 5
    groups = [(observed[~rare], expected[~rare])]
    if rare.any():
        groups.append((observed[rare].sum()[None], expected[rare].sum()[None]))
    chi2 = sum(float(((o - e).square() / e).sum()) for o, e in groups)
    freedom = int((~rare).sum()) + int(rare.any()) - 1
    assert freedom > 50
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5
    assert int((observed > 0).sum()) >= 0.95 * int((expected > 3).sum()), "tokens were cut off"
    assert float(observed[rare].sum()) == pytest.approx(
        float(expected[rare].sum()), abs=5 * max(float(expected[rare].sum()), 1) ** 0.5
    )


def test_later_tokens_follow_the_softmax_too(lm: PreTrainedModel) -> None:
    # Two tokens deep: the joint share of each pair is the product of both softmaxes.
    queries = [[7, 30, 11], [9]]
    responses = draw(lm, queries * 6000, max_tokens=2, temperature=0.4)
    for row, query in enumerate(queries):
        pairs = responses.ids[row::2]
        with torch.no_grad():
            first = torch.softmax(lm(input_ids=torch.tensor([query])).logits[0, -1] / 0.4, -1)
            token = int(first.argmax())
            logits = lm(input_ids=torch.tensor([[*query, token]])).logits[0, -1]
        second = torch.softmax(logits / 0.4, -1)
        for other in second.topk(3).indices.tolist():
            share = float(first[token] * second[other])
            seen = ((pairs[:, 0] == token) & (pairs[:, 1] == other)).float().mean()
            assert abs(float(seen) - share) < 5 * (share * (1 - share) / 6000) ** 0.5 + 1e-3


def test_the_generator_alone_decides(lm: PreTrainedModel, sequences: list[list[int]]) -> None:
    first = draw(lm, sequences, max_tokens=5, seed=1)
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    again, other = (draw(lm, sequences, max_tokens=5, seed=seed) for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.lists() == again.lists() != other.lists()


@pytest.mark.parametrize("stop", [EOS, 7])
def test_a_query_that_ends_in_a_stop_token_is_refused(stop: int) -> None:
    with pytest.raises(
        ValueError, match=rf"query 1 ends in the stop token {stop}; expected a prompt"
    ):
        draw(Scripted({}), [[3], [3, stop]], max_tokens=1, stops=(EOS, 7))


def test_an_end_token_inside_a_query_is_fine() -> None:
    assert draw(Scripted({4: [5]}), [[3, EOS, 4]], max_tokens=1).lists() == [[5]]


def naive_logprobs(
    model: PreTrainedModel, query: Sequence[int], answer: Sequence[int], temperature: float
) -> list[float]:
    """Log-prob of each token of the answer in one forward pass over the unpadded sequence."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*query, *answer]])).logits[0].double()
    logp = torch.log_softmax(logits / temperature, -1)
    return [float(logp[len(query) - 1 + t, token]) for t, token in enumerate(answer)]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_while_decoding_are_those_of_a_forward_pass(
    family_lm: PreTrainedModel, sequences: list[list[int]], temperature: float
) -> None:
    # Some end early, so that later tokens of the others are drawn beside padding.
    stops = tuple(range(1, 60))
    queries = [[*sequence, 299] for sequence in sequences]
    responses = draw(family_lm, queries, max_tokens=8, temperature=temperature, stops=stops, seed=1)
    lengths = [len(answer) for answer in responses.lists()]
    assert len(set(lengths)) > 2
    assert responses.logprobs.dtype == torch.float32
    for row, (query, answer) in enumerate(zip(queries, responses.lists(), strict=True)):
        expected = naive_logprobs(family_lm, query, answer, temperature)
        assert responses.logprobs[row, : len(answer)].tolist() == pytest.approx(expected, abs=1e-4)
        assert not responses.logprobs[row, len(answer) :].any()


def test_a_token_drawn_for_sure_costs_nothing() -> None:
    responses = draw(*answering([5, EOS, 7], [6, 7, 8]), max_tokens=3)
    assert responses.logprobs.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_sampling_leaves_no_graph(lm: PreTrainedModel) -> None:
    responses = draw(lm, [[3]], max_tokens=2)
    assert not responses.ids.requires_grad
    assert not responses.logprobs.requires_grad


# Who else is in the batch


# Some rows end early at these, and some go on to the limit.
EARLY = tuple(range(1, 40))


@pytest.mark.parametrize(
    ("still_running", "prefill_tokens", "room", "packed"),
    [
        (0.0, 4096, 64, True), (1.0, 4096, 2, True), (0.75, 8, 1, True), (0.75, 4096, 64, False),
        (1.0, 1, 64, False),
    ],
)  # fmt: skip
def test_what_is_drawn_does_not_depend_on_who_is_in_the_batch(
    family_lm: PreTrainedModel, sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch,
    still_running: float, prefill_tokens: int, room: int, packed: bool,
) -> None:  # fmt: skip
    queries = [[*sequence, 299] for sequence in sequences for _ in range(2)]

    def drawn() -> Responses:
        return draw(family_lm, queries, max_tokens=8, stops=EARLY, seed=4)

    expected = drawn()
    lengths = [len(answer) for answer in expected.lists()]
    assert len(set(lengths)) > 3
    assert len({tuple(answer) for answer in expected.lists()}) > len(sequences)
    monkeypatch.setattr(generate, "STILL_RUNNING", still_running)
    monkeypatch.setattr(generate, "PREFILL_TOKENS", prefill_tokens)
    monkeypatch.setattr(cache, "ROOM", room)
    if not packed:
        monkeypatch.setattr(generate, "take_packed", lambda _: False)
    found = drawn()
    assert found.lists() == expected.lists()
    assert torch.equal(found.has_eos, expected.has_eos)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)


def test_a_row_is_answered_as_if_it_were_alone(
    lm: PreTrainedModel, sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = [[*sequence, 299] for sequence in sequences]
    uniform = torch.rand(
        len(queries), 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    together = draw(lm, queries, max_tokens=8, stops=EARLY, seed=4)
    for row, query in enumerate(queries):
        monkeypatch.setattr(torch, "rand", lambda *_, row=row, **__: uniform[row : row + 1])
        alone = draw(lm, [query], max_tokens=8, stops=EARLY)
        assert alone.lists() == [together.lists()[row]]


def test_rows_that_have_ended_leave_and_a_repeated_query_is_read_once() -> None:
    model = Scripted({20: [5] * 8, 21: [EOS] * 8, 22: [6, EOS], 23: [7, 7, 7, EOS]})
    queries = [[20], [21], [22], [23], [20], [21], [22], [23]]
    responses = draw(model, queries, max_tokens=8)
    lines = [[5] * 8, [EOS], [6, EOS], [7, 7, 7, EOS]]
    assert responses.lists() == [*lines, *lines]
    # Four queries; then 6, 4, 4 and 2 of the 8 rows go on. A quarter may stay with them.
    assert [len(call["input_ids"]) for call in model.calls] == [4, 8, 4, 4, 2, 2, 2, 2]


@pytest.mark.parametrize("part", [1, 2, 3, 4, 256])
def test_a_token_is_drawn_where_the_distribution_function_passes_the_number(
    monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(generate, "PART", part)
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().repeat(6, 1)
    numbers = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 2**-53], dtype=torch.float64)
    token, logprob = generate._draw(logits, 1.0, numbers)
    assert token.tolist() == [0, 0, 2, 2, 3, 3]
    assert logprob.exp().tolist() == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.3, 0.3], abs=1e-6)


def test_the_rarest_tokens_can_be_drawn() -> None:
    # Beside a probability near 1, float32 would not see them.
    logits = torch.tensor([[0.0, -20.0, -20.0]])
    last = 1 - 0.5 * torch.tensor([-20.0], dtype=torch.float64).exp()
    assert generate._draw(logits, 1.0, last)[0].item() == 2
