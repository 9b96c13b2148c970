"""What evaluate and contest share: held-out prompts, models that score, the table of answers."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from plumbline.data.rows import read_rows
from plumbline.models.scalar_head import load_scalar_model
from plumbline.params.schema import EvaluateParams
from plumbline.refs import DataRef, ModelRef
from tasks import model_store, tracking


def read_prompts(tracked: tracking.StepRun, prompts: DataRef, params: EvaluateParams) -> list[str]:
    """The prompts that are answered; notes that the step has read them."""
    texts: list[str] = read_rows(tracking.open_uri(prompts.uri))["prompt"][: params.max_prompts]
    tracked.dataset("prompts", prompts.digest, prompts.uri, prompts.rows, "evaluation")
    return texts


def open_scorer(model: ModelRef, device: torch.device) -> PreTrainedModel:
    """A reward model or a judge, ready to score."""
    return load_scalar_model(model_store.model_folder(model)).to(device).eval()


def publish_answers(
    tracked: tracking.StepRun, rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Log a table of answers; returns it as it is shown, with the last turn of each prompt."""
    shown = [{**row, "prompt": json.loads(row["prompt"])[-1]["content"]} for row in rows]
    tracked.table("samples", shown)
    return shown
