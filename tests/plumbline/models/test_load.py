"""Base models and tokenizers, from scratch and from a folder, with dropout off for good."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from plumbline.data.tokenize import PLAIN_TEMPLATE
from plumbline.models.load import (
    base_model,
    base_tokenizer,
    build_scratch_model,
    load_lm,
    load_tokenizer,
)
from plumbline.params.schema import LocalModel, ScratchModel

SCRATCH = ScratchModel(
    source="scratch", vocab_size=300, context_tokens=24, hidden_size=16, layers=1, heads=2
)
IDS = torch.tensor([[5, 6, 7, 8]])


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_scratch_model_has_the_shape_of_the_params(tokenizer: PreTrainedTokenizerBase) -> None:
    config = build_scratch_model(SCRATCH, tokenizer, seed=0).config
    assert (config.n_positions, config.n_embd, config.n_layer, config.n_head) == (24, 16, 1, 2)
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (300, 0, 1)


def test_the_seed_decides_the_weights(tokenizer: PreTrainedTokenizerBase) -> None:
    first, again, other = (build_scratch_model(SCRATCH, tokenizer, seed) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


CONFIGS = {
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2,
            resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5,
        ),
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=16, attention_dropout=0.5,
        ),
    ),
    "neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(
            vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=16, attention_dropout=0.5,
            hidden_dropout=0.5,
        ),
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            vocab_size=20, hidden_size=8, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, word_embed_proj_dim=8, dropout=0.5, attention_dropout=0.5,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_dropout_is_off_even_in_training_mode(family: str, tmp_path: Path) -> None:
    build, config = CONFIGS[family]
    torch.manual_seed(0)
    build(config).save_pretrained(tmp_path)
    model = load_lm(tmp_path).train()
    with torch.no_grad():
        first, second = (model(input_ids=IDS).logits for _ in range(2))
        calm = model.eval()(input_ids=IDS).logits
    assert torch.equal(first, second)
    torch.testing.assert_close(first, calm)


def test_dropout_stays_off_once_saved(tmp_path: Path) -> None:
    build, config = CONFIGS["gpt2"]
    build(config).save_pretrained(tmp_path / "from")
    load_lm(tmp_path / "from").save_pretrained(tmp_path / "to")
    saved = json.loads((tmp_path / "to" / "config.json").read_text())
    assert (saved["resid_pdrop"], saved["embd_pdrop"], saved["attn_pdrop"]) == (0.0, 0.0, 0.0)


def test_a_saved_model_comes_back_in_float32(
    lm_folder: Path, shared_lm: PreTrainedModel, tmp_path: Path
) -> None:
    assert same(load_lm(lm_folder), shared_lm)
    load_lm(lm_folder).bfloat16().save_pretrained(tmp_path)
    assert load_lm(tmp_path).dtype == torch.float32


def test_a_saved_tokenizer_comes_back(lm_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load_tokenizer(lm_folder)
    assert loaded("fold the sheet")["input_ids"] == tokenizer("fold the sheet")["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)


def test_pickled_weights_are_refused(lm_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((lm_folder / "config.json").read_bytes())
    torch.save(load_lm(lm_folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_lm(tmp_path)


def test_base_model_from_scratch(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    texts = ["fold it", "fold it in half"]
    assert len(base_tokenizer(SCRATCH, tmp_path, texts)) <= 300
    model = base_model(SCRATCH, tmp_path, tokenizer, seed=4)
    assert same(model, build_scratch_model(SCRATCH, tokenizer, seed=4))


def test_base_model_from_a_folder_relative_to_the_root(
    lm_folder: Path, shared_lm: PreTrainedModel
) -> None:
    params = LocalModel(source="local", path=lm_folder.name)
    tokenizer = base_tokenizer(params, lm_folder.parent, ["never read"])
    assert len(tokenizer) == 300
    assert same(base_model(params, lm_folder.parent, tokenizer, seed=0), shared_lm)


def test_the_params_template_wins_over_the_tokenizers_own(lm_folder: Path) -> None:
    own = base_tokenizer(LocalModel(source="local", path=str(lm_folder)), Path(), [])
    assert "<|assistant|>" in own.chat_template
    params = LocalModel(source="local", path=str(lm_folder), chat_template="{{ messages }}")
    assert base_tokenizer(params, Path(), []).chat_template == "{{ messages }}"


def test_a_bare_tokenizer_gets_a_plain_template_and_a_pad_token(
    lm_folder: Path, tmp_path: Path
) -> None:
    bare = load_tokenizer(lm_folder)
    bare.chat_template, bare.pad_token = None, None
    bare.padding_side = "right"
    bare.save_pretrained(tmp_path)
    load_lm(lm_folder).save_pretrained(tmp_path)
    params = LocalModel(source="local", path=str(tmp_path))
    tokenizer = base_tokenizer(params, Path(), [])
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (tokenizer.eos_token_id, "left")
    assert base_model(params, Path(), tokenizer, seed=0).config.pad_token_id == 1
