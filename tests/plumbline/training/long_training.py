"""SFT and then RL, in a process that tests kill; takes the folder to write to."""

import copy
import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GPT2ForSequenceClassification, PreTrainedModel

from plumbline.data.tokenize import ChatEncoder, train_tokenizer
from plumbline.models.load import build_scratch_model
from plumbline.params.schema import (
    CheckpointParams,
    RLParams,
    SamplingParams,
    ScratchModel,
    SFTParams,
)
from plumbline.training.checkpoint import Checkpoints
from plumbline.training.models import Models
from plumbline.training.policy_update import Setting
from plumbline.training.rl import train_rl
from plumbline.training.sft import train_sft


class Terminated(BaseException):
    """As schedulers raise it on SIGTERM."""


def terminate(number: int, frame: Any) -> None:
    raise Terminated


def listeners(name: str, folder: Path, history: list[dict[str, float]]) -> dict[str, Any]:
    def log(step: int, metrics: Mapping[str, float]) -> None:
        history.append({k: v for k, v in metrics.items() if not k.startswith(("time/", "perf/"))})

    def progress(done: int, total: int) -> None:
        print(f"{name}: {done} of {total}", flush=True)
        # Time for a signal to come.
        time.sleep(0.02)

    checkpoints = Checkpoints(
        folder / name, CheckpointParams(every_steps=3), warn=print,
        resumed=lambda place: print(name, "goes on from", place.label),
    )  # fmt: skip
    return {"log": log, "progress": progress, "checkpoints": checkpoints}


def sft(lm: PreTrainedModel, **options: Any) -> None:
    rows = [
        {"prompt": [3, 10 + row, 1, 4], "response": [40 + row, 50 + row % 5, 1]}
        for row in range(40)
    ]
    params = SFTParams(epochs=8, batch_size=4, micro_batch_tokens=48)
    train_sft(lm, rows, params, pad_token_id=0, seed=1, **options)


def rl(lm: PreTrainedModel, encoder: ChatEncoder, **options: Any) -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    scorer = GPT2ForSequenceClassification(config).eval()
    prompts = [json.dumps([{"role": "user", "content": text}]) for text in ("fold", "a", "lake")]
    params = RLParams(
        episodes=240, rollout_batch_size=8, mini_batch_size=4, micro_batch_tokens=48, epochs=2,
        missing_eos="subtract", missing_eos_score=0.0,
    )  # fmt: skip
    train_rl(
        Models(lm, copy.deepcopy(lm), scorer, copy.deepcopy(scorer)), prompts, encoder,
        Setting(params, SamplingParams(response_tokens=6)), seed=1, warn=lambda *_: None,
        **options,
    )  # fmt: skip


def main(folder: Path) -> None:
    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tokenizer = train_tokenizer(
        ["How do I fold a paper plane? Fold it.", "Where does the river end? In the lake."], 300
    )
    size = ScratchModel(
        source="scratch", vocab_size=300, context_tokens=64, hidden_size=32, layers=2, heads=2
    )
    lm = build_scratch_model(size, tokenizer, seed=0).eval()
    history: list[dict[str, float]] = []
    sft(lm, **listeners("sft", folder, history))
    rl(lm, ChatEncoder(tokenizer), **listeners("rl", folder, history))
    weights = {name: weight.detach().clone() for name, weight in lm.named_parameters()}
    save_file(weights, folder / "weights")
    (folder / "history.json").write_text(json.dumps(history, sort_keys=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
