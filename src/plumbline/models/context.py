"""The context length of a pretrained model, read from its files without loading torch."""

import json
from pathlib import Path
from typing import Any

from plumbline.errors import ParamsError
from plumbline.models.gguf import gguf_path, read_header
from plumbline.params.schema import (
    Experiment,
    GGUFModel,
    HubModel,
    LocalModel,
    PretrainedModel,
    ScratchModel,
    check_context,
)

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def check_model(experiment: Experiment, root: Path) -> None:
    """Check that the model is there and that prompt and response fit its context.

    Raises:
        ParamsError: there is no such model, or it is too short.
    """
    model = experiment.model
    if isinstance(model, ScratchModel):
        return
    try:
        check_context(experiment, _context_tokens(model, root))
    except ValueError as error:
        raise ParamsError(str(error)) from error


def _context_tokens(model: PretrainedModel, root: Path) -> int:
    if isinstance(model, GGUFModel):
        return read_header(gguf_path(model, root)).context_tokens
    config = _config(model, root)
    context = next((int(config[key]) for key in CONTEXT_KEYS if key in config), None)
    if context is None:
        raise ParamsError(
            f"model: expected one of {', '.join(CONTEXT_KEYS)} in the model's config.json, got none"
        )
    return context


def _config(model: HubModel | LocalModel, root: Path) -> dict[str, Any]:
    if isinstance(model, LocalModel):
        path = root / model.path / "config.json"
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(model.name, "config.json", revision=model.revision))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ParamsError(
                f"model.name: can't get {model.name} at revision {model.revision} from the hub "
                f"({error}). Check name and revision, or set HF_HUB_OFFLINE=0 if it is set."
            ) from error
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ParamsError(
            "model.path: expected a folder with config.json, model.safetensors and the tokenizer's "
            f"files, as save_pretrained writes them; can't read {path} ({error})"
        ) from error
    return config
