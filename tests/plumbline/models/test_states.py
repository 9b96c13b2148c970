"""Hidden states and log-probabilities, packed, shared or padded, against each sequence alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from plumbline.data.collate import pad_left, pad_right
from plumbline.models import packed_attention, states
from plumbline.models.packed_attention import NAME, take_packed
from plumbline.models.states import last_states, states_before, token_stats
from plumbline.ops import attention
from plumbline.params.schema import LoraParams
from plumbline.rollout.generate import sample_responses
from plumbline.training.lora import add_adapter
from plumbline.training.memory import checkpointing

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


def gemma2() -> PreTrainedModel:
    """Caps its logits, and looks back two tokens only in every other layer."""
    config = Gemma2Config(
        **SIZES, head_dim=8, final_logit_softcapping=3.0, sliding_window=2,
        attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def cohere() -> PreTrainedModel:
    """Scales its logits."""
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))


def mistral() -> PreTrainedModel:
    """Looks back three tokens."""
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3))


def doge() -> PreTrainedModel:
    """Makes a mask of its own from the one that it is given."""
    return DogeForCausalLM(DogeConfig(**SIZES))


def mixtral() -> PreTrainedModel:
    """Counts its tokens by the mask, to balance its experts."""
    config = MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True)
    return MixtralForCausalLM(config)


def minicpm3() -> PreTrainedModel:
    """Has values that are narrower than its keys."""
    config = MiniCPM3Config(
        **{**SIZES, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, head_dim=4,
    )  # fmt: skip
    return MiniCPM3ForCausalLM(config)


OTHERS = {
    "gemma2": gemma2, "cohere": cohere, "mistral": mistral, "doge": doge, "mixtral": mixtral,
    "minicpm3": minicpm3,
}  # fmt: skip
PACKED = (CohereForCausalLM, MiniCPM3ForCausalLM)
LINEAR = (MistralForCausalLM, DogeForCausalLM, MixtralForCausalLM, MiniCPM3ForCausalLM)


@pytest.fixture(params=sorted(OTHERS))
def other_lm(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return OTHERS[request.param]().eval()


def targets_of(mask: Tensor) -> Tensor:
    """All tokens but the first of each sequence."""
    return mask & (mask.cumsum(1) > 1)


def alone(model: PreTrainedModel, sequences: list[list[int]], temperature: float) -> list[Tensor]:
    """Log-probs of all tokens but the first ones, and entropies before them; with a gradient."""
    logprobs, entropies = [], []
    for sequence in sequences:
        ids = torch.tensor([sequence])
        logp = torch.log_softmax(model(input_ids=ids).logits[0, :-1] / temperature, -1)
        logprobs.append(logp.gather(1, ids[0, 1:, None]).squeeze(1))
        entropies.append(-(logp.exp() * logp).sum(-1))
    return [torch.cat(logprobs), torch.cat(entropies)]


def compare(
    model: PreTrainedModel, sequences: list[list[int]], side: Any, near: float, *,
    is_linear: bool, pairs: bool = False,
) -> None:  # fmt: skip
    """Numbers and gradients are those of each sequence alone, whatever the padding."""
    reference = copy.deepcopy(model)
    ids, mask = side(sequences, 0)
    targets = targets_of(mask)
    before = states_before(model, ids, mask, targets, pairs=pairs)
    assert before.is_linear == is_linear
    assert before.hidden.shape == (int(targets.sum()), 32)
    mine = token_stats(model, before, ids[targets], 0.7)
    expected = alone(reference, sequences, 0.7)
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other, atol=near, rtol=near)
    weighing = torch.linspace(-1, 2, len(mine.logprobs))
    for logprobs, entropies in (mine, expected):
        (weighing * logprobs - 0.3 * entropies).sum().backward()
    for (name, weight), theirs in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        if theirs.grad is not None:
            torch.testing.assert_close(
                weight.grad, theirs.grad, atol=near, rtol=near, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("side", [pad_left, pad_right])
def test_every_family_is_packed_and_gives_the_numbers_of_each_sequence_alone(
    family_lm: PreTrainedModel, sequences: list[list[int]], side: Any
) -> None:
    assert take_packed(family_lm)
    compare(family_lm.double(), sequences, side, 1e-9, is_linear=True)


@pytest.mark.parametrize("side", [pad_left, pad_right])
def test_models_that_do_more_to_logits_or_see_less_give_their_own_numbers(
    other_lm: PreTrainedModel, sequences: list[list[int]], side: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Five tokens a part, so that there are several.
    monkeypatch.setattr(states, "WHOLE_BYTES", 5 * 4 * 300)
    assert take_packed(other_lm) == isinstance(other_lm, PACKED)
    # Some of these always take their norms in float32.
    is_linear = isinstance(other_lm, LINEAR)
    compare(other_lm, sequences, side, 2e-4, is_linear=is_linear)


# Two that part after some tokens, in the middle and at the end; two of which one begins with the
# other, either way; two that have nothing in common; and two that are the same.
PAIRS = [
    [5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 12, 13],
    [20, 21, 22, 23, 24, 25], [20, 21, 22, 23, 24, 26],
    [30, 31, 32], [30, 31, 32, 33, 34],
    [40, 41, 42, 43, 44], [40, 41, 42],
    [50, 51, 52], [60, 51, 52, 53],
    [70, 71, 72, 73], [70, 71, 72, 73],
]  # fmt: skip
DIFFERENT = 7 + 2 + 6 + 1 + 5 + 5 + 3 + 4 + 4


@pytest.mark.parametrize("one_block", [256, 1])
def test_what_a_pair_shares_is_computed_once_and_gives_the_numbers_of_each_alone(
    family_lm: PreTrainedModel, one_block: int, in_double: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both ways to attend.
    monkeypatch.setattr(packed_attention, "ONE_BLOCK", one_block)
    assert take_packed(family_lm)
    read: list[int] = []
    family_lm.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: read.append(inputs[0].numel())
    )
    model = in_double(family_lm)
    with checkpointing(model):
        compare(model, PAIRS, pad_right, 1e-9, is_linear=True, pairs=True)
    assert read[0] == DIFFERENT
    model.zero_grad()
    compare(model, PAIRS, pad_left, 1e-9, is_linear=True, pairs=True)


@pytest.mark.parametrize("pairs", [False, True])
def test_sizes_that_are_rounded_change_no_number(
    family_lm: PreTrainedModel, sequences: list[list[int]], pairs: bool, in_double: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for module in (states, attention):
        monkeypatch.setattr(module, "size_multiple", lambda *_: 128)
    assert take_packed(family_lm)
    read: list[int] = []
    family_lm.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: read.append(inputs[0].numel())
    )
    model = in_double(family_lm)
    compare(model, PAIRS if pairs else sequences, pad_right, 1e-9, is_linear=True, pairs=pairs)
    # More than the models' contexts, which what is added must not reach beyond.
    assert read[0] == 128


def test_models_that_do_more_or_see_less_give_their_own_numbers_of_pairs(
    other_lm: PreTrainedModel,
) -> None:
    is_linear = isinstance(other_lm, LINEAR)
    compare(other_lm, PAIRS, pad_right, 2e-4, is_linear=is_linear, pairs=True)


def test_what_is_said_of_a_sequence_does_not_depend_on_who_is_packed_with_it(
    family_lm: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Short ones and long ones attend in two ways, that differ in bf16.
    monkeypatch.setattr(packed_attention, "ONE_BLOCK", 6)
    short, pair, long = [*range(5, 10)], PAIRS[:2], [*range(20, 40)]

    def said(sequences: list[list[int]], row: int) -> list[float]:
        ids, mask = pad_right(sequences, 0)
        targets = targets_of(mask)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            before = states_before(family_lm, ids, mask, targets, pairs=True)
            logprobs = token_stats(family_lm, before, ids[targets]).logprobs
        return logprobs.split(targets.sum(1).tolist())[row].tolist()

    assert take_packed(family_lm)
    near_short = said([short, short[:3]], 0)
    near_long = said([short, long], 0)
    assert near_short == pytest.approx(near_long, abs=1e-6)
    assert said([*pair, short, long], 2) == pytest.approx(near_short, abs=1e-6)
    assert said([short, long, *pair], 3) == pytest.approx(said(pair, 1), abs=1e-6)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_model_with_an_adapter_is_read_with_it(
    lm: PreTrainedModel, sequences: list[list[int]], pairs: bool
) -> None:
    sequences = PAIRS if pairs else sequences
    add_adapter(lm, LoraParams(enabled=True, rank=4), seed=0)
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    ids, mask = pad_right(sequences, 0)
    targets = targets_of(mask)
    before = states_before(lm, ids, mask, targets, pairs=pairs)
    mine = token_stats(lm, before, ids[targets])
    torch.testing.assert_close(mine.logprobs, alone(lm, sequences, 1.0)[0], atol=1e-4, rtol=0)
    mine.logprobs.sum().backward()
    trained = [weight for weight in lm.parameters() if weight.requires_grad]
    assert all(weight.grad is not None for weight in trained)
    assert lm.get_output_embeddings().weight.grad is None


@pytest.mark.parametrize("pairs", [False, True])
def test_last_states_are_those_of_each_sequence_alone(
    family_lm: PreTrainedModel, sequences: list[list[int]], pairs: bool
) -> None:
    sequences = PAIRS if pairs else sequences
    ids, mask = pad_right(sequences, 0) if pairs else pad_left(sequences, 0)
    with torch.no_grad():
        states_of_all = last_states(family_lm.base_model, ids, mask, pairs=pairs)
        mine = states_of_all.split([len(s) for s in sequences])
        for states_of, sequence in zip(mine, sequences, strict=True):
            whole = family_lm.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
            torch.testing.assert_close(states_of, whole, atol=1e-4, rtol=0)


def test_a_model_that_was_packed_still_samples_and_is_saved_as_before(
    family_lm: PreTrainedModel, sequences: list[list[int]]
) -> None:
    def draw() -> list[list[int]]:
        return sample_responses(
            family_lm, sequences, max_tokens=5, stop_token_ids=[1], pad_token_id=0,
            temperature=1e-6, generator=torch.Generator().manual_seed(0),
        ).lists()  # fmt: skip

    before, config = draw(), family_lm.config.to_dict()
    assert take_packed(family_lm)
    assert draw() == before
    assert family_lm.config.to_dict() == config
    assert NAME not in str(config)


def test_padding_costs_no_computation(lm: PreTrainedModel) -> None:
    seen: list[tuple[int, ...]] = []
    lm.transformer.h[0].mlp.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape[:2]))
    )
    ids, mask = pad_right([[5] * 20, [6], [7, 8]], 0)
    states_before(lm, ids, mask, targets_of(mask))
    assert seen == [(1, 23)]


def test_logits_are_not_made(lm: PreTrainedModel, sequences: list[list[int]]) -> None:
    seen: list[int] = []
    lm.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.numel()))
    ids, mask = pad_right(sequences, 0)
    targets = targets_of(mask)
    token_stats(lm, states_before(lm, ids, mask, targets), ids[targets])
    assert seen == [0]


def test_nothing_stays_hooked_to_the_model(
    other_lm: PreTrainedModel, sequences: list[list[int]]
) -> None:
    head = other_lm.get_output_embeddings()
    ids, mask = pad_right(sequences, 0)
    targets = targets_of(mask)
    with torch.no_grad():
        token_stats(other_lm, states_before(other_lm, ids, mask, targets), ids[targets])
        assert not head._forward_pre_hooks
        assert not head._forward_hooks
        with pytest.raises((RuntimeError, IndexError)):
            states_before(other_lm, ids + 300, mask, targets)
    assert not head._forward_pre_hooks
    assert not head._forward_hooks
