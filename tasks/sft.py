"""Step sft: the base model learns the demonstrations."""

from typing import Literal

from prefect import task

from plumbline.data.rows import encode_rows, read_rows
from plumbline.data.tokenize import ChatEncoder
from plumbline.models.load import load_lm, load_tokenizer
from plumbline.params.schema import SFTParams
from plumbline.refs import ModelRef, SplitRef
from plumbline.training.device import training_device
from plumbline.training.memory import memory_advice
from plumbline.training.precision import autocast, resolve_precision
from plumbline.training.sft import held_out_loss, train_sft
from tasks import model_store, tracking
from tasks.caching import step_options
from tasks.checkpoints import step_checkpoints
from tasks.live import step_progress


@task(name="sft", **step_options)
def sft(
    params: SFTParams,
    precision: Literal["auto", "fp32", "bf16"],
    seed: int,
    max_new_tokens: int,
    base_model: ModelRef,
    demonstrations: SplitRef,
    run: tracking.PipelineRun,
) -> ModelRef:
    """Fine-tune the base model on the demonstrations."""
    asked = {**params.model_dump(), "seed": seed, "precision": precision}
    with (
        tracking.step_run(run, "sft", asked) as tracked,
        step_progress(tracked, "rows") as progress,
        memory_advice("sft"),
    ):
        tokenizer = load_tokenizer(model_store.tokenizer_folder(base_model))
        encoder = ChatEncoder(tokenizer)
        train, test = (
            encode_rows(read_rows(tracking.open_uri(split.uri)), encoder)
            for split in (demonstrations.train, demonstrations.test)
        )
        tracked.dataset(
            "demonstrations", demonstrations.train.digest, demonstrations.train.uri,
            demonstrations.train.rows, "training",
        )  # fmt: skip
        device = training_device()
        resolved = resolve_precision(precision, device)
        tracked.tag({"precision": resolved})
        model = load_lm(model_store.model_folder(base_model)).to(device)
        train_sft(
            model, train, params,
            pad_token_id=encoder.pad_token_id, seed=seed, precision=resolved,
            log=tracked.log, progress=progress, checkpoints=step_checkpoints(run, tracked),
        )  # fmt: skip
        with autocast(device, resolved):
            loss = held_out_loss(model, test, params.micro_batch_tokens, encoder.pad_token_id)
        return model_store.log_model(
            tracked,
            "text-generation",
            model,
            tokenizer,
            max_new_tokens=max_new_tokens,
            metrics={"sft/held_out_loss": loss},
        )
