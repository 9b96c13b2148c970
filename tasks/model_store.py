"""Models in MLflow: their weights written once, and the folders they are read from."""

import contextlib
import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import mlflow
import mlflow.transformers
import torch
import transformers
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import ColSpec, Schema
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plumbline.artifacts import new_folder, write_manifest
from plumbline.errors import ParamsError, TrainingError
from plumbline.models.load import load_lm
from plumbline.refs import ModelRef
from plumbline.training.lora import load_merged, save_adapter
from tasks.records import ADAPTED, content_digest, local_path
from tasks.tracking import StepRun, client, open_uri
from tasks.tracking import point_alias as point_alias

ADAPTER_LOADER = "tasks.adapter_loader"
"""The module by which MLflow loads an adapter."""


def log_model(
    tracked: StepRun,
    kind: Literal["text-generation", "text-classification"],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int | None = None,
    metrics: Mapping[str, float],
) -> ModelRef:
    """Log a model, its weights written once, and return the ref to it."""

    def save(folder: Path, logged: Any) -> None:
        _save_model(folder, logged, kind, model, tokenizer, max_new_tokens)

    return _log(tracked, kind, save, metrics)


def log_adapter(
    tracked: StepRun,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: ModelRef,
    max_new_tokens: int,
    metrics: Mapping[str, float],
) -> ModelRef:
    """Log the adapters on a model alone, beside the name of the model that they change."""

    def save(folder: Path, logged: Any) -> None:
        _describe_adapter(folder, logged, max_new_tokens)
        save_adapter(model, folder / "adapter", base=f"sha256:{base.digest}")
        tokenizer.save_pretrained(folder / "components" / "tokenizer")
        adapted = {"uri": base.uri, "digest": base.digest}
        (folder / ADAPTED).write_text(json.dumps(adapted) + "\n")

    return _log(tracked, "adapter", save, metrics)


def log_policy(
    tracked: StepRun,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: ModelRef | None,
    max_new_tokens: int,
    metrics: Mapping[str, float],
) -> ModelRef:
    """Log an aligned language model: whole, or its adapters where it has them on `base`."""
    if base is not None:
        return log_adapter(
            tracked, model, tokenizer, base=base, max_new_tokens=max_new_tokens, metrics=metrics
        )
    return log_model(
        tracked, "text-generation", model, tokenizer, max_new_tokens=max_new_tokens, metrics=metrics
    )


def _log(
    tracked: StepRun, kind: str, save: Callable[[Path, Any], None], metrics: Mapping[str, float]
) -> ModelRef:
    """Let `save` write a new logged model, whole or not at all."""
    logged = client().create_logged_model(
        tracked.experiment_id, name=tracked.step, source_run_id=tracked.run_id, model_type=kind
    )
    try:
        with _model_folder(logged.artifact_location, logged.model_id) as folder:
            save(folder, logged)
            digest = content_digest(write_manifest(folder))
    except BaseException as error:
        _discard_model(logged)
        if isinstance(error, OSError) or "No space" in str(error):
            raise TrainingError(
                f"{tracked.step}: can't write the model to {logged.artifact_location} ({error}). "
                "Make room, then run again: finished steps come from the cache."
            ) from error
        raise
    client().finalize_logged_model(logged.model_id, "READY")
    client().log_outputs(tracked.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    tracked.finals(metrics)
    return ModelRef(
        digest=digest,
        uri=logged.artifact_location,
        mlflow_run_id=tracked.run_id,
        mlflow_model_id=logged.model_id,
        metrics=dict(metrics),
        figures=tracked.figures,
        figure_digests=tracked.figure_digests,
        seconds=tracked.seconds,
    )


def registered_folder(name: str) -> Path:
    """The local folder of a registered model, NAME@ALIAS or NAME/VERSION.

    Raises:
        ParamsError: the registry has no such model.
    """
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{name}"))
    except MlflowException as error:
        raise ParamsError(
            f"No registered model {name}: expected NAME@ALIAS or NAME/VERSION, for example "
            "plumbline-policy@challenger. Run an experiment first: plumbline run quickstart. "
            f"({error})"
        ) from error


def model_folder(model: ModelRef) -> Path:
    """Folder of a whole model's config and weights."""
    return open_uri(model.uri) / "model"


def is_adapter(model: ModelRef) -> bool:
    """Whether a logged model is an adapter on another one."""
    return (open_uri(model.uri) / ADAPTED).exists()


def open_policy(folder: Path) -> PreTrainedModel:
    """The language model of a logged model: whole, or an adapter merged into what it changes."""
    if not (folder / ADAPTED).exists():
        return load_lm(folder / "model")
    model = load_lm(open_uri(json.loads((folder / ADAPTED).read_bytes())["uri"]) / "model")
    load_merged(model, folder / "adapter")
    return model


def tokenizer_folder(model: ModelRef) -> Path:
    """Folder of the model's tokenizer."""
    return open_uri(model.uri) / "components" / "tokenizer"


@contextlib.contextmanager
def _model_folder(location: str, model_id: str) -> Iterator[Path]:
    """The folder to save a logged model in, which comes to its place whole or not at all."""
    path = local_path(location)
    if path is not None:
        with new_folder(path) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        yield folder
        client().log_model_artifacts(model_id, str(folder))


def _discard_model(logged: Any) -> None:
    """Leave nothing of a model that was written in part."""
    client().finalize_logged_model(logged.model_id, "FAILED")
    path = local_path(logged.artifact_location)
    if path is not None:
        shutil.rmtree(path.parent, ignore_errors=True)


def _describe_adapter(folder: Path, logged: Any, max_new_tokens: int) -> None:
    """Write what MLflow wants to know of an adapter: its signature, and what loads it.

    MLflow's own form of an adapter names a model of the hub, which ours is not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = _describe(logged)
    described.signature = _text_to_text()
    described.add_flavor(
        "python_function",
        loader_module=ADAPTER_LOADER,
        python_version=platform.python_version(),
        config={"max_new_tokens": max_new_tokens},
    )
    described.save(str(folder / "MLmodel"))


def _describe(logged: Any) -> Model:
    return Model(
        run_id=logged.source_run_id,
        model_id=logged.model_id,
        artifact_path=logged.artifact_location,
    )


def _text_to_text() -> ModelSignature:
    text = Schema([ColSpec("string")])
    return ModelSignature(inputs=text, outputs=text)


def _save_model(
    folder: Path,
    logged: Any,
    kind: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int | None,
) -> None:
    if kind == "text-generation":
        signature = _text_to_text()
        config = {"max_new_tokens": max_new_tokens, "return_full_text": False}
    else:
        text = Schema([ColSpec("string")])
        score = Schema([ColSpec("string", "label"), ColSpec("double", "score")])
        signature, config = ModelSignature(inputs=text, outputs=score), {}
    # An empty name keeps MLflow from looking for a model card on the hub.
    model.name_or_path = ""
    mlflow.transformers.save_model(
        {"model": model.cpu(), "tokenizer": tokenizer},
        str(folder),
        task=kind,
        signature=signature,
        model_config=config,
        # Named, or MLflow would load the model in a fresh process to find them out.
        pip_requirements=[
            f"torch=={torch.__version__}",
            f"transformers=={transformers.__version__}",
        ],
        mlflow_model=_describe(logged),
    )
