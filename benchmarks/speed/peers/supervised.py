"""SFT and reward model as the newest TRL trains them: `SFTTrainer` and `RewardTrainer`.

The spec's `setting`:

default   nothing is set but what the work needs: batches of 8, gradient checkpointing, bf16.
packed    (SFT) packing to `packed_tokens`, so many packs a step that a step has as many tokens as
          the other sides' on average; no gradient checkpointing.
grouped   rows of like length in a batch, as many rows a step as the other side; no gradient
          checkpointing.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.speed.peers import common
from benchmarks.speed.worker import Result, Spec, rows_of, serve, timed

Row = dict[str, list[int]]
"""`prompt` with `response`, or with `chosen` and `rejected`: token ids."""


def work(spec: Spec) -> Result:
    """Train on the rows once; say how long it took."""
    rows = rows_of(spec["model"])[spec["kind"]][: spec["rows_used"]]
    make = sft_trainer if spec["kind"] == "sft" else reward_trainer
    network = (common.language_model if spec["kind"] == "sft" else _fresh)(
        spec["model"], torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        ids = torch.tensor([_ids(rows[0])], device=network.device)
        network(input_ids=ids).logits.float().mean().backward()
        network.zero_grad(set_to_none=True)
        trainer = make(network, rows, spec, folder)
        with timed() as clock:
            done = trainer.train()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return {
        "kind": spec["kind"],
        "rows": len(rows),
        "tokens": sum(map(tokens, rows)),
        "seconds": clock.seconds,
        "tokens_per_s": sum(map(tokens, rows)) / clock.seconds,
        "rows_per_s": len(rows) / clock.seconds,
        "mean_loss": done.training_loss,
        "mixed_precision": trainer.accelerator.mixed_precision,
        **common.memory(),
        **common.setup(),
    }


def _fresh(model: Spec, _: torch.dtype) -> Any:
    return common.fresh_scalar_model(model)


def _ids(row: Row) -> list[int]:
    return [*row["prompt"], *row.get("response", row.get("chosen", []))]


def tokens(row: Row) -> int:
    """Real tokens that a row's sequences have."""
    prompts = 1 if "response" in row else 2
    return sum(map(len, row.values())) + (prompts - 1) * len(row["prompt"])


def _options(spec: Spec, folder: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": not torch.cuda.is_available(),
        "num_train_epochs": 1,
        "learning_rate": spec["learning_rate"],
        "seed": spec["seed"],
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if spec["setting"] == "default":
        return options
    options |= {"gradient_checkpointing": False, "bf16": True}
    if spec["setting"] == "grouped":
        options |= {
            "train_sampling_strategy": "group_by_length",
            "per_device_train_batch_size": spec["batch"],
            # Else the lengths are gone before they are looked at.
            "remove_unused_columns": False,
        }
    return options


def sft_trainer(model: Any, rows: list[Row], spec: Spec, folder: str) -> SFTTrainer:
    """The trainer, on rows that are token ids already."""
    options = _options(spec, folder)
    if spec["setting"] == "packed":
        packs = spec["batch"] * sum(map(tokens, rows)) / len(rows) / spec["packed_tokens"]
        options |= {
            "packing": True,
            "max_length": spec["packed_tokens"],
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": max(1, round(packs)),
        }
    columns: dict[str, Any] = {
        "input_ids": [[*row["prompt"], *row["response"]] for row in rows],
        "completion_mask": [[0] * len(row["prompt"]) + [1] * len(row["response"]) for row in rows],
    }
    if spec["setting"] == "grouped":
        columns["length"] = [len(ids) for ids in columns["input_ids"]]
    return SFTTrainer(
        model=model,
        args=SFTConfig(completion_only_loss=True, **options),
        train_dataset=Dataset.from_dict(columns),
        processing_class=common.tokenizer(spec["model"]),
    )


def reward_trainer(model: Any, rows: list[Row], spec: Spec, folder: str) -> RewardTrainer:
    """The trainer, on pairs that are token ids already."""
    columns: dict[str, Any] = {
        f"{side}_ids": [[*row["prompt"], *row[side]] for row in rows]
        for side in ("chosen", "rejected")
    }
    if spec["setting"] == "grouped":
        both = zip(columns["chosen_ids"], columns["rejected_ids"], strict=True)
        columns["length"] = [max(map(len, pair)) for pair in both]
    return RewardTrainer(
        model=model,
        args=RewardConfig(**_options(spec, folder)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=common.tokenizer(spec["model"]),
    )


if __name__ == "__main__":
    serve(work)
