"""Base models and tokenizers, from scratch and from a folder, with dropout off for good."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
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
    PreTrainedTokenizerFast,
)

from plumbline.data.collate import pad_right
from plumbline.data.tokenize import PLAIN_TEMPLATE, ChatEncoder
from plumbline.errors import ParamsError
from plumbline.models.load import (
    base_model,
    base_tokenizer,
    build_scratch_model,
    load_lm,
    load_tokenizer,
)
from plumbline.models.scalar_head import scalar_model_from_lm, sequence_scores
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


def bare_folder(lm_folder: Path, folder: Path, **changes: object) -> LocalModel:
    """The tiny model with a tokenizer without template and pad token, and with these changes."""
    bare = load_tokenizer(lm_folder)
    bare.chat_template, bare.pad_token, bare.padding_side = None, None, "right"
    for name, value in changes.items():
        setattr(bare, name, value)
    bare.save_pretrained(folder)
    model = load_lm(lm_folder)
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.save_pretrained(folder)
    return LocalModel(source="local", path=str(folder))


def test_a_bare_tokenizer_gets_a_plain_template_and_a_pad_token(
    lm_folder: Path, tmp_path: Path
) -> None:
    params = bare_folder(lm_folder, tmp_path)
    tokenizer = base_tokenizer(params, Path(), [])
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|pad|>", "left")
    model = base_model(params, Path(), tokenizer, seed=0)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0


@pytest.mark.parametrize(
    ("specials", "own", "expected"),
    [
        # (special tokens, (pad, unk), what pads); the end token is always <|end|>.
        (["<|system|>", "<|end|>", "<pad>"], (None, None), "<pad>"),
        (["<|system|>", "<|end|>", "<pad>"], ("<|end|>", None), "<pad>"),
        (["<|system|>", "<|end|>", "<pad>"], ("<|system|>", None), "<|system|>"),
        (["<|end|>", "<|reserved_7|>", "<unk>"], (None, "<unk>"), "<|reserved_7|>"),
        (["<|end|>", "<unk>", "<|user|>"], (None, "<unk>"), "<unk>"),
        (["<|end|>", "<|user|>"], (None, None), "<|end|>"),
        (["<|end|>"], (None, "<|end|>"), "<|end|>"),
    ],
)
def test_what_ends_a_response_pads_only_where_nothing_else_is_free(
    specials: list[str], own: tuple[str | None, str | None], expected: str, tmp_path: Path
) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(["fold"], trainer)
    pad, unk = own
    given = {"pad_token": pad, "unk_token": unk, "eos_token": "<|end|>"}
    PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: token for name, token in given.items() if token}
    ).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = base_tokenizer(LocalModel(source="local", path=str(tmp_path)), Path(), [])
    assert tokenizer.pad_token == expected
    assert len(tokenizer) == len(backend.get_vocab()), "a new token would have no embedding"


def test_a_token_that_the_template_writes_does_not_pad(lm_folder: Path, tmp_path: Path) -> None:
    params = bare_folder(lm_folder, tmp_path, chat_template="<|pad|>{{ messages[0]['content'] }}")
    tokenizer = base_tokenizer(params, Path(), [])
    assert tokenizer.pad_token == tokenizer.eos_token


def test_plain_transformers_reads_the_score_of_a_model_that_padded_with_its_end_token(
    lm_folder: Path, tmp_path: Path, sequences: list[list[int]]
) -> None:
    params = bare_folder(lm_folder, tmp_path / "bare", pad_token="<|end|>")
    encoder = ChatEncoder(base_tokenizer(params, Path(), []))
    base_model(params, Path(), encoder.tokenizer, seed=0).save_pretrained(tmp_path / "lm")
    scorer = scalar_model_from_lm(tmp_path / "lm", seed=1).eval()
    closed = [[*sequence, encoder.end_token_id] for sequence in sequences]
    ids, mask = pad_right(closed, encoder.pad_token_id)
    with torch.no_grad():
        plain = scorer(input_ids=ids, attention_mask=mask.long()).logits.squeeze(1)
        ours = sequence_scores(scorer, ids, mask)
    torch.testing.assert_close(plain, ours, atol=1e-4, rtol=0)


def test_a_served_model_stops_where_a_turn_ends(lm_folder: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}<|user|>{{ m['content'] }}<|system|>{% endfor %}"
    params = bare_folder(lm_folder, tmp_path, chat_template=template)
    tokenizer = base_tokenizer(params, Path(), [])
    model = base_model(params, Path(), tokenizer, seed=0)
    assert ChatEncoder(tokenizer).stop_token_ids == (2, 1)
    assert model.generation_config.eos_token_id == [2, 1]


def test_a_malformed_chat_template_is_refused(lm_folder: Path) -> None:
    params = LocalModel(source="local", path=str(lm_folder), chat_template="{% for m in %}")
    with pytest.raises(ParamsError, match=r"model\.chat_template: .*syntax error"):
        base_tokenizer(params, Path(), [])
