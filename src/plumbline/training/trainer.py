"""transformers' Trainer with this project's checkpoints: reading its own could run code."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from plumbline.errors import TrainingError
from plumbline.interruption import uninterrupted
from plumbline.training.checkpoint import Checkpoints, Keeper, Place, State
from plumbline.training.perf import Pace
from plumbline.training.precision import Precision, autocast
from plumbline.training.reporting import Log, Progress
from plumbline.training.state import (
    load_networks,
    load_optimizer,
    load_random,
    load_schedule,
    on_device,
    random_state,
    schedule_state,
    weights_state,
)

LOSS_ADVICE = (
    "expected a finite loss; lower {section}.learning_rate or {section}.max_grad_norm, or look for "
    "odd rows with `plumbline data check`"
)


class Stats(Protocol):
    """Metrics of a training beside its loss, gathered between two logs."""

    def take(self) -> Mapping[str, float]:
        """The metrics since the last call."""

    def state(self) -> State:
        """What was gathered since the last call of `take`; it must not change afterwards."""

    def restore(self, state: State) -> None:
        """Go on from what `state` returned, its tensors on the training's device."""


class Listeners:
    """Whom a training tells what it does, and all that it has told so far."""

    def __init__(
        self,
        section: str,
        rows: int,
        log: Log,
        progress: Progress,
        stats: Stats | None,
        pace: Pace,
    ) -> None:
        """Tell nobody anything yet; `rows` counts those of all epochs."""
        self.section = section
        self.rows = rows
        self.history: list[dict[str, float]] = []
        self._log = log
        self._progress = progress
        self._stats = stats
        self._pace = pace
        self._told = 0

    def note(self, step: int, logs: Mapping[str, float]) -> None:
        """Keep the Trainer's logs of a step; raises TrainingError where training lost its way."""
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs[name]):
                raise TrainingError(
                    f"{self.section}: the {name} is {logs[name]} at step {step}; "
                    + LOSS_ADVICE.format(section=self.section)
                )
        metrics = {
            f"{self.section}/loss": logs["loss"],
            f"{self.section}/grad_norm": float(logs["grad_norm"]),
            f"{self.section}/lr": logs["learning_rate"],
            f"{self.section}/epoch": logs["epoch"],
            **(self._stats.take() if self._stats else {}),
            **self._pace.take(),
        }
        self.history.append({"step": step, **metrics})

    def tell(self, step: int, steps: int) -> None:
        """Pass on what was noted since the last call, and how far the training is."""
        for row in self.history[self._told :]:
            self._told += 1
            self._log(int(row["step"]), {k: v for k, v in row.items() if k != "step"})
        # The last batch of an epoch is shorter than the others.
        self._progress(round(self.rows * step / steps), self.rows)


class ResumableTrainer(Trainer):
    """A Trainer that goes on from the newest checkpoint, bit by bit as if it had never stopped."""

    def __init__(
        self,
        *,
        listeners: Listeners,
        checkpoints: Checkpoints | None,
        stats: Stats | None,
        pace: Pace,
        **options: Any,
    ) -> None:
        """A Trainer with these options; `stats` is saved and restored, too, but not `pace`."""
        super().__init__(**options)
        self.listeners = listeners
        self.stats = stats
        self.pace = pace
        self.keeper = Keeper(checkpoints, self._weights)
        self._held = ExitStack()
        self._restored: State | None = None
        self._committed = 0
        # It prints to the terminal, which belongs to the progress bars.
        self.remove_callback(PrinterCallback)
        self.add_callback(_Steps(listeners, self._held, self._begin))

    def fit(self) -> None:
        """Train to the end, from the start or from the newest checkpoint."""
        # A section that an error leaves open ends with the training.
        with self._held:
            self._restored = self.keeper.resume()
            if self._restored is None:
                self.train()
                return
            # The Trainer asks a folder how far it is, and its own methods, below, for the rest.
            folder = Path(self.args.output_dir)
            trainer_state = TrainerState(**self._restored["trainer"])
            trainer_state.save_to_json(str(folder / "trainer_state.json"))
            self._committed = trainer_state.global_step
            self.listeners.history = self._restored["history"]
            self.train(resume_from_checkpoint=str(folder))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Leave the gradient of a mini-batch, one micro-batch after the other; return its loss."""
        parts = inputs["micro_batches"]
        count = self._get_num_items_in_batch(parts, self.args.device)
        device = self.args.device
        precision: Precision = "bf16" if self.args.bf16 else "fp32"
        total = torch.zeros((), device=device)
        model.train()
        # Weights are narrowed once for all micro-batches: autocast keeps the copies.
        with autocast(device, precision):
            for part in parts:
                loss = self.compute_loss(
                    model, self._prepare_inputs(part), num_items_in_batch=count
                )
                with autocast(device, "fp32"):
                    self.accelerator.backward(loss)
                total += loss.detach()
        self.pace.add(inputs["work"], inputs["rows"])
        return total

    def _begin(self) -> None:
        """Set what the Trainer sets anew as a training begins."""
        self.pace.restart()
        if self._restored is None:
            return
        self._tr_loss = self._restored["loss"].to(self.args.device)
        self._globalstep_last_logged = self._restored["last_logged"]
        self._total_loss_scalar = self._restored["total_loss"]
        self._load_rng_state(None)
        if self.stats:
            self.stats.restore(on_device(self._restored["stats"], self.args.device))
        self.listeners.tell(self.state.global_step, self.state.max_steps)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        step, steps = self.state.global_step, self.state.max_steps
        # It is called at the end of an epoch, too.
        if step == self._committed:
            return
        self._committed = step
        self.keeper.commit(Place(step, step, f"step {step} of {steps}"), self._snapshot)
        self._held.close()
        # Listeners may be slow, and an interruption must not wait for them.
        self.listeners.tell(step, steps)

    def _snapshot(self) -> State:
        return {
            "trainer": {**vars(self.state), "log_history": []},
            "loss": self._tr_loss.clone(),
            "last_logged": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,
            "history": list(self.listeners.history),
            "stats": self.stats.state() if self.stats else {},
            "random": random_state(),
            **schedule_state(self.optimizer, self.lr_scheduler),
        }

    def _weights(self) -> State:
        return weights_state({"model": self.model}, self.optimizer)

    # What the Trainer calls to read a checkpoint.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self._restored is not None
        load_networks({"model": self.model}, self._restored["weights"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._restored is not None:
            # Read last, and as large as all that is trained.
            load_optimizer(self.optimizer, self._restored.pop("weights"))
            load_schedule(self.optimizer, self.lr_scheduler, self._restored)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._restored is not None:
            load_random(self._restored["random"])


class _Steps(TrainerCallback):
    """Lets nothing come between an optimizer step and the commit that follows it."""

    def __init__(self, listeners: Listeners, held: ExitStack, begin: Callable[[], None]) -> None:
        self.listeners = listeners
        self.held = held
        self.begin = begin

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.held.enter_context(uninterrupted())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # The last steps count, too, and a training may be shorter than one interval.
        control.should_log |= state.global_step == state.max_steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            self.listeners.note(state.global_step, logs)
