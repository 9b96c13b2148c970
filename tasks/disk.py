"""Whether the disk has room for what a run will write."""

import shutil
from pathlib import Path

from plumbline.errors import MachineError
from plumbline.models.gguf import gguf_path, read_header
from plumbline.params.schema import Experiment, GGUFModel, LocalModel, ScratchModel

MODELS_WRITTEN = 4
"""base_model, sft, reward_model and rl or dpo each write one; the judge is one more."""
SPARE = 200 * 2**20
"""For databases, figures and prepared data, in bytes."""


def check_room(home: Path, experiment: Experiment, root: Path, *, runs: int = 1) -> None:
    """Check that the models of a run fit on the disk.

    Args:
        home: the project's folder for generated files.
        experiment: that runs.
        root: the project's.
        runs: of a sweep; each writes one model at least.

    Raises:
        MachineError: they don't.
    """
    models = MODELS_WRITTEN + runs - 1 + experiment.evaluate.judge + checkpointed_models(experiment)
    needed = models * model_bytes(experiment, root) + SPARE
    free = shutil.disk_usage(home).free
    if free < needed:
        raise MachineError(
            f"{home}: expected {needed / 2**30:.2f} GiB free for the models and checkpoints of "
            f"this run, got {free / 2**30:.2f} GiB. Make room, lower checkpoints.keep, or set "
            "PLUMBLINE_HOME to a folder on another disk."
        )


def checkpointed_models(experiment: Experiment) -> int:
    """How many times the size of a model the checkpoints of the largest step take at once.

    Each has the trained weights and AdamW's two moments, and one more is written before the oldest
    goes. An adapter's are too small to count.
    """
    reinforced = experiment.alignment.method == "rl"
    aligned = experiment.rl if reinforced else experiment.dpo
    networks = 0 if aligned.lora.enabled else 1
    if reinforced and networks and experiment.rl.algorithm == "ppo":
        networks += experiment.rl.critic == "reward_model"
    for section in (experiment.sft, experiment.reward_model):
        networks = max(networks, not section.lora.enabled)
    return 3 * networks * (experiment.checkpoints.keep + 1)


def model_bytes(experiment: Experiment, root: Path) -> int:
    """Size of the base model in float32; of a hub model only the spare room is asked for."""
    model = experiment.model
    if isinstance(model, ScratchModel):
        width = model.hidden_size
        return 4 * (
            (model.vocab_size + model.context_tokens) * width + 12 * model.layers * width**2
        )
    if isinstance(model, LocalModel):
        # Weights in half precision are written in full.
        return 2 * sum(path.stat().st_size for path in (root / model.path).glob("*.safetensors"))
    if isinstance(model, GGUFModel):
        return 4 * read_header(gguf_path(model, root)).parameters
    return 0
