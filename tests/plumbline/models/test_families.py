"""What holds for every family of language models: GPT-2, Llama, Qwen2 and Qwen3."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from plumbline.data.collate import pad_left, pad_right, position_ids
from plumbline.losses.preference import pairwise_loss
from plumbline.models.load import base_model, base_tokenizer, load_lm
from plumbline.models.scalar_head import (
    load_scalar_model,
    normalise_scores,
    scalar_model_from_lm,
    score_head,
    score_shift,
    sequence_scores,
    token_values,
)
from plumbline.params.schema import LocalModel

PAD, EOS = 0, 1
ROPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.5,
    # Ten times the usual: a model that says nearly the same everywhere would hide a fault.
    "initializer_range": 0.2,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
FAMILIES: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
            resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5,
            bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD,
        ),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig(**ROPE)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**ROPE, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**ROPE, head_dim=16)),
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(
    request: pytest.FixtureRequest,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with a model as its makers would publish it, dropout and all."""
    build, config = FAMILIES[request.param]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    build(copy.deepcopy(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(family: Path) -> PreTrainedModel:
    return load_lm(family).eval()


@pytest.fixture
def scalar_model(family: Path) -> PreTrainedModel:
    return scalar_model_from_lm(family, seed=1).eval()


def test_a_base_model_is_what_its_folder_holds(family: Path, tmp_path: Path) -> None:
    params = LocalModel(source="local", path=str(family))
    tokenizer = base_tokenizer(params, Path(), [])
    model = base_model(params, Path(), tokenizer, seed=0).eval()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = load_lm(family).eval()(ids).logits
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(load_lm(tmp_path).eval()(ids).logits, expected)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == PAD
    assert model.generation_config.eos_token_id == EOS


def test_dropout_is_off_in_training_mode(family: Path, sequences: list[list[int]]) -> None:
    ids, mask = pad_right(sequences, PAD)
    for model in (load_lm(family), scalar_model_from_lm(family, seed=1)):
        with torch.no_grad():
            calm = model.eval()(ids, attention_mask=mask.long()).logits
            first, second = (model.train()(ids, attention_mask=mask.long()).logits for _ in "12")
        assert torch.equal(first, second)
        torch.testing.assert_close(first, calm)


@pytest.mark.parametrize("side", [pad_left, pad_right])
def test_logits_are_the_same_padded_or_alone(
    model: PreTrainedModel, sequences: list[list[int]], side: Any
) -> None:
    ids, mask = side(sequences, PAD)
    with torch.no_grad():
        together = model(
            input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask)
        ).logits
        for row, sequence in enumerate(sequences):
            alone = model(input_ids=torch.tensor([sequence])).logits[0]
            torch.testing.assert_close(together[row][mask[row]], alone, atol=1e-4, rtol=0)


def by_hand(model: PreTrainedModel, sequence: list[int]) -> list[float]:
    """The value of each position of an unpadded sequence: last hidden state times head."""
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
        return (hidden @ model.score.weight[0]).tolist()


@pytest.mark.parametrize("pad", [PAD, EOS])
@pytest.mark.parametrize("side", [pad_left, pad_right])
def test_scores_are_the_same_padded_or_alone(
    scalar_model: PreTrainedModel, sequences: list[list[int]], side: Any, pad: int
) -> None:
    closed = [[*sequence, EOS] for sequence in sequences]
    expected = [by_hand(scalar_model, sequence) for sequence in closed]
    padded, mask = side(closed, pad)
    with torch.no_grad():
        scores = sequence_scores(scalar_model, padded, mask).tolist()
        values = token_values(scalar_model, padded, mask)
    assert scores == pytest.approx([row[-1] for row in expected], abs=1e-4)
    for row, positions, mine in zip(values, mask, expected, strict=True):
        assert row[positions].tolist() == pytest.approx(mine, abs=1e-4)
    assert len({round(score, 3) for score in scores}) == len(scores)


def test_the_loss_of_pairs_and_its_gradient_are_those_of_each_sequence_alone(
    scalar_model: PreTrainedModel, in_double: Any
) -> None:
    pairs = [[5, 6, 7, 8, 9, 10, EOS], [5, 6, 7, 8, 12, EOS], [20, 21, EOS], [20, 30, 31, EOS]]
    model = in_double(scalar_model)
    other = copy.deepcopy(model)
    alone = [other.base_model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in pairs]
    expected = torch.stack([state @ other.score.weight[0] for state in alone])
    mine = sequence_scores(model, *pad_right(pairs, PAD), pairs=True)
    torch.testing.assert_close(mine, expected, atol=1e-9, rtol=1e-9)
    for scores in (mine, expected):
        pairwise_loss(*scores.view(-1, 2).unbind(1), margin=0.3, centering=0.1)[0].backward()
    for weight, theirs in zip(model.parameters(), other.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(weight.grad, theirs.grad, atol=1e-9, rtol=1e-9)


def test_the_head_is_fresh_and_the_trunk_is_the_language_models(
    scalar_model: PreTrainedModel, model: PreTrainedModel
) -> None:
    assert score_head(scalar_model).weight.shape == (1, 32)
    assert score_head(scalar_model).bias is None
    trunk = scalar_model.base_model.state_dict()
    assert all(torch.equal(trunk[name], w) for name, w in model.base_model.state_dict().items())


def test_normalised_scores_survive_saving(
    scalar_model: PreTrainedModel, sequences: list[list[int]], tmp_path: Path
) -> None:
    ids, mask = pad_right(sequences, PAD)
    raw = torch.tensor([by_hand(scalar_model, sequence)[-1] for sequence in sequences])
    normalise_scores(scalar_model, float(raw.mean()), float(raw.std()))
    scalar_model.save_pretrained(tmp_path)
    loaded = load_scalar_model(tmp_path).eval()
    with torch.no_grad():
        for model in (scalar_model, loaded):
            scores = sequence_scores(model, ids, mask)
            torch.testing.assert_close(scores, (raw - raw.mean()) / raw.std(), atol=1e-4, rtol=0)
    # RMSNorm has no bias that could take the shift.
    assert (score_shift(loaded) == 0) == (loaded.config.model_type == "gpt2")


def test_plain_transformers_reads_the_score_at_the_end_token(
    scalar_model: PreTrainedModel, sequences: list[list[int]], tmp_path: Path
) -> None:
    closed = [[*sequence, EOS] for sequence in sequences]
    scalar_model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids, mask = pad_right(closed, PAD)
    with torch.no_grad():
        scores = plain(ids, attention_mask=mask.long()).logits.squeeze(1)
    expected = [by_hand(scalar_model, sequence)[-1] for sequence in closed]
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)
