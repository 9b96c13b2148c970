"""What a trained policy's responses to held-out prompts score, both sides judged alike."""

from pathlib import Path

import torch

from benchmarks.speed.ours.models import scalar_model
from benchmarks.speed.worker import Result, Spec, rows_of, serve
from plumbline.models.load import load_lm
from plumbline.rollout.experience import Sequences, score_sequences
from plumbline.rollout.generate import sample_responses
from plumbline.training.device import training_device
from plumbline.training.precision import autocast, resolve_precision


@torch.no_grad()
def work(spec: Spec) -> Result:
    """Sample a response to each prompt, and score it."""
    device = training_device()
    rows = rows_of(spec["model"])
    queries = rows["held_out"][: spec["prompts"]]
    policy = load_lm(Path(spec["policy"])).to(device).eval()
    with autocast(device, resolve_precision("auto", device)):
        responses = sample_responses(
            policy, queries, max_tokens=spec["response_tokens"], stop_token_ids=[rows["end"]],
            pad_token_id=rows["pad"], temperature=spec["temperature"],
            generator=torch.Generator(device).manual_seed(0),
        )  # fmt: skip
    sequences = Sequences.join(queries, responses, rows["pad"])
    scores = score_sequences(scalar_model(spec["model"], device), sequences, 4096)
    return {
        "scores": scores.tolist(),
        "mean": float(scores.mean()),
        "ended_share": float(responses.has_eos.float().mean()),
        "response_tokens": float(responses.mask.sum(1).float().mean()),
    }


if __name__ == "__main__":
    serve(work)
