"""Step base_model: the language model that everything starts from, with its tokenizer."""

from prefect import task

from plumbline.data.rows import read_rows
from plumbline.data.tokenize import training_texts
from plumbline.errors import MachineError
from plumbline.models import load
from plumbline.params.schema import ModelParams, ScratchModel
from plumbline.project import find_project
from plumbline.refs import DataRef, ModelRef
from tasks import model_store, tracking
from tasks.caching import step_options
from tasks.keys import cache_key, ingredients


@task(name="base_model", **step_options)
def base_model(
    params: ModelParams,
    seed: int,
    max_new_tokens: int,
    demonstrations: DataRef | None,
    run: tracking.PipelineRun,
) -> ModelRef:
    """Make or fetch the base model; from scratch, its tokenizer learns the demonstrations."""
    with tracking.step_run(run, "base_model", {**params.model_dump(), "seed": seed}) as tracked:
        texts: list[str] = []
        if isinstance(params, ScratchModel) and demonstrations is not None:
            rows = read_rows(tracking.open_uri(demonstrations.uri))
            texts = training_texts(rows["prompt"], rows["response"])
        root = find_project().root
        tokenizer = load.base_tokenizer(params, root, texts)
        model = load.base_model(params, root, tokenizer, seed)
        asked = {
            "params": params,
            "seed": seed,
            "max_new_tokens": max_new_tokens,
            "demonstrations": demonstrations,
        }
        if run.key and cache_key("base_model", ingredients("base_model", asked)) != run.key:
            raise MachineError(
                "The files of the base model were edited after the run began, so that it is not "
                "the model that the run was planned with. Run again when nothing writes to them."
            )
        return model_store.log_model(
            tracked,
            "text-generation",
            model,
            tokenizer,
            max_new_tokens=max_new_tokens,
            metrics={
                "base_model/parameters": float(model.num_parameters()),
                "base_model/vocabulary": float(len(tokenizer)),
            },
        )
