"""Reward models and critics: the fresh head, where the score is read, and its normalisation."""

import copy
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    pipeline,
)

from plumbline.data.collate import pad_left, pad_right
from plumbline.models.scalar_head import (
    load_scalar_model,
    normalise_scores,
    scalar_model_from_lm,
    score_head,
    score_shift,
    sequence_scores,
    token_values,
)
from plumbline.training.reward_model import score_texts

PAD, EOS = 0, 1


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=PAD, eos_token_id=EOS,
        bos_token_id=EOS, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(llama_folder: Path) -> PreTrainedModel:
    return scalar_model_from_lm(llama_folder, seed=1).eval()


def alone(model: PreTrainedModel, sequence: list[int]) -> float:
    """The score of an unpadded sequence by a plain forward pass: last state times head."""
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0, -1]
        return float(hidden @ model.score.weight[0])


def test_the_head_is_small_and_has_no_bias(lm_folder: Path) -> None:
    weights = []
    for seed in range(40):
        head = score_head(scalar_model_from_lm(lm_folder, seed))
        assert head.bias is None
        assert head.weight.shape == (1, 32)
        weights.append(head.weight.detach())
    everything = torch.cat(weights).flatten()
    # 1280 draws: the standard error of the std is 2%, that of the mean 0.005.
    assert float(everything.std()) == pytest.approx(1 / math.sqrt(33), rel=0.08)
    assert abs(float(everything.mean())) < 0.02


def test_the_seed_decides_the_head_and_leaves_the_global_generator_alone(lm_folder: Path) -> None:
    first, again, other = (score_head(scalar_model_from_lm(lm_folder, s)).weight for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_trunk_is_the_language_model(lm_folder: Path, shared_lm: PreTrainedModel) -> None:
    trunk = scalar_model_from_lm(lm_folder, 0).base_model.state_dict()
    assert all(torch.equal(trunk[k], v) for k, v in shared_lm.base_model.state_dict().items())


@pytest.mark.parametrize("pad", [PAD, EOS])
@pytest.mark.parametrize("side", [pad_left, pad_right])
def test_a_score_is_the_same_padded_or_alone(
    scorer: PreTrainedModel, sequences: list[list[int]], side: type, pad: int
) -> None:
    closed = [[*sequence, EOS] for sequence in sequences]
    with torch.no_grad():
        scores = sequence_scores(scorer, *side(closed, pad))
    expected = [alone(scorer, sequence) for sequence in closed]
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 3) for score in expected}) == len(expected)


def test_a_score_does_not_depend_on_the_batch(
    scorer: PreTrainedModel, sequences: list[list[int]]
) -> None:
    whole = score_texts(scorer, sequences, 6, PAD)
    for batch_size in (1, 4):
        torch.testing.assert_close(
            score_texts(scorer, sequences, batch_size, PAD), whole, atol=1e-4, rtol=0
        )
    order = [4, 1, 5, 0, 3, 2]
    shuffled = score_texts(scorer, [sequences[i] for i in order], 4, PAD)
    torch.testing.assert_close(shuffled, whole[order], atol=1e-4, rtol=0)


def test_token_values_are_the_scores_of_the_beginnings(
    scorer: PreTrainedModel, sequences: list[list[int]]
) -> None:
    ids, mask = pad_left(sequences, PAD)
    with torch.no_grad():
        values = token_values(scorer, ids, mask)
    for row, sequence in enumerate(sequences):
        expected = [alone(scorer, sequence[: t + 1]) for t in range(len(sequence))]
        assert values[row][mask[row]].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["scorer", "llama"])
def test_normalised_scores_have_mean_0_and_std_1(
    family: str, request: pytest.FixtureRequest, sequences: list[list[int]]
) -> None:
    model = request.getfixturevalue(family)
    before = score_texts(model, sequences, 4, PAD)
    normalise_scores(model, float(before.mean()), float(before.std()))
    after = score_texts(model, sequences, 4, PAD)
    assert float(after.mean()) == pytest.approx(0, abs=1e-5)
    assert float(after.std()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(after, (before - before.mean()) / before.std(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["scorer", "llama"])
def test_a_score_less_the_mean_by_default(
    family: str, request: pytest.FixtureRequest, sequences: list[list[int]]
) -> None:
    model = request.getfixturevalue(family)
    before = score_texts(model, sequences, 4, PAD)
    normalise_scores(model, 2.5)
    after = score_texts(model, sequences, 4, PAD)
    torch.testing.assert_close(after, before - 2.5, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["scorer", "llama"])
def test_normalising_twice_is_normalising_what_the_first_left(
    family: str, request: pytest.FixtureRequest, sequences: list[list[int]]
) -> None:
    model = request.getfixturevalue(family)
    before = score_texts(model, sequences, 4, PAD)
    normalise_scores(model, 1.5, 2.0)
    normalise_scores(model, -3.0, 0.5)
    after = score_texts(model, sequences, 4, PAD)
    torch.testing.assert_close(after, ((before - 1.5) / 2 + 3) / 0.5, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["scorer", "llama"])
def test_the_normalisation_survives_saving(
    family: str, request: pytest.FixtureRequest, sequences: list[list[int]], tmp_path: Path
) -> None:
    model = request.getfixturevalue(family)
    normalise_scores(model, 0.7, 1.9)
    model.save_pretrained(tmp_path)
    loaded = load_scalar_model(tmp_path).eval()
    torch.testing.assert_close(
        score_texts(loaded, sequences, 4, PAD), score_texts(model, sequences, 4, PAD)
    )


def test_plain_transformers_serves_the_normalised_raw_score(
    scorer: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    normalise_scores(scorer, 0.7, 1.9)
    scorer.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["Where does the river end? In the lake.", "Fold it.", "Zażółć 你好"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ours = score_texts(load_scalar_model(tmp_path).eval(), ids, 3, PAD).tolist()

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert plain.config.problem_type == "regression"
    padded, mask = pad_right(ids, PAD)
    with torch.no_grad():
        together = plain(input_ids=padded, attention_mask=mask.long()).logits.squeeze(1).tolist()
    assert together == pytest.approx(ours, abs=1e-4)

    serve = pipeline("text-classification", model=plain, tokenizer=tokenizer, device="cpu")
    served = [answer["score"] for answer in serve(texts)]
    assert served == pytest.approx(ours, abs=1e-4)
    assert any(not 0 <= score <= 1 for score in served), "a sigmoid would hide the raw score"


def test_a_model_without_a_norm_bias_keeps_the_shift_in_its_config(
    llama: PreTrainedModel, tmp_path: Path, sequences: list[list[int]]
) -> None:
    raw = [alone(llama, sequence) for sequence in sequences]
    normalise_scores(llama, 3.0, 2.0)
    llama.save_pretrained(tmp_path)
    loaded = load_scalar_model(tmp_path).eval()
    assert loaded.config.score_shift == score_shift(loaded) == pytest.approx(1.5)
    expected = [(score - 3) / 2 for score in raw]
    assert score_texts(loaded, sequences, 4, PAD).tolist() == pytest.approx(expected, abs=1e-4)


def test_gpt2_absorbs_the_shift_into_its_weights(scorer: PreTrainedModel) -> None:
    before = copy.deepcopy(scorer)
    normalise_scores(scorer, 3.0, 2.0)
    assert score_shift(scorer) == 0
    changed = {
        name
        for name, tensor in scorer.state_dict().items()
        if not torch.equal(tensor, before.state_dict()[name])
    }
    assert changed == {"score.weight", "transformer.ln_f.bias"}


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan])
def test_a_std_that_is_not_positive_is_refused(scorer: PreTrainedModel, std: float) -> None:
    before = score_head(scorer).weight.clone()
    with pytest.raises(ValueError, match="expected std > 0, got"):
        normalise_scores(scorer, 0.0, std)
    assert torch.equal(score_head(scorer).weight, before)
