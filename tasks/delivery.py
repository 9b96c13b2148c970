"""What a run logs, as records that can wait on disk, and the calls that bring them to MLflow."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag
from mlflow.exceptions import MlflowException

from plumbline.project import find_project
from tasks.faults import first_line
from tasks.locks import step_lock
from tasks.mlflow_client import client
from tasks.progress import show_warning
from tasks.spool import Outbox, Record, Spool, orphans

RunState = Literal["FINISHED", "FAILED", "KILLED"]

POINTS_A_CALL = 1000
"""MLflow takes so many metrics at once."""
DIGEST_CHARACTERS = 36
ERROR_CHARACTERS = 500
CLOSING_SECONDS = 3.0
"""A run that ends waits so long for MLflow: a process that is told to stop must come to an end."""


def metrics_record(metrics: Mapping[str, float], step: int = 0) -> Record:
    """Metrics of a step, logged now."""
    values = {name: float(value) for name, value in metrics.items()}
    return {"metrics": values, "step": step, "time": _now()}


def dataset_record(
    name: str, digest: str, source: str, size: Mapping[str, int], context: str
) -> Record:
    """A data set that a run reads; `size` says how much is in it, in MLflow's words."""
    return {
        "dataset": {
            "name": name,
            "digest": digest[:DIGEST_CHARACTERS],
            "source_type": "local",
            "source": json.dumps({"uri": source}),
            "profile": json.dumps(size),
        },
        "context": context,
    }


def deliver(to: Any, run_id: str, records: Sequence[Record], folder: Path = Path()) -> None:
    """Tell MLflow all records of a run; those that it knows already change nothing.

    Args:
        to: MLflow's client.
        run_id: of the run.
        records: in the order in which they were logged.
        folder: holds the files that records name.
    """
    points = [
        Metric(name, value, record["time"], record["step"])
        for record in records
        for name, value in record.get("metrics", {}).items()
    ]
    for start in range(0, len(points), POINTS_A_CALL):
        to.log_batch(run_id, metrics=points[start : start + POINTS_A_CALL])
    for record in records:
        match record:
            case {"tags": tags}:
                to.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
            case {"file": path}:
                to.log_artifact(run_id, str(folder / path))
            case {"dataset": fields, "context": context}:
                label = InputTag("mlflow.data.context", context)
                to.log_inputs(run_id, datasets=[DatasetInput(Dataset(**fields), [label])])
            case {"end": state, "time": ended}:
                to.set_terminated(run_id, state, ended)


def open_outbox(run_id: str) -> Outbox:
    """Where a run logs to; nothing that holds up MLflow holds up who logs."""
    to = client()

    def send(spool: Spool, records: Sequence[Record]) -> None:
        to.check()
        deliver(to.at_once, spool.run_id, records, spool.folder)

    return Outbox(_spools() / run_id, send)


def close_outbox(outbox: Outbox, state: RunState, error: BaseException | None = None) -> None:
    """End a run, with what ended it; raises nothing, for what comes after must be done, too."""
    # A refusal that nobody has heard of yet: what ends the run weighs more.
    with contextlib.suppress(Exception):
        outbox.settle(0)
    try:
        if error is not None:
            outbox.put({"tags": {"plumbline.error": first_line(error)[:ERROR_CHARACTERS]}})
        outbox.put({"end": state, "time": _now()})
        if not outbox.close(CLOSING_SECONDS):
            show_warning("MLflow is away: what was logged waits on disk; the next run sends it")
    except Exception as failure:
        show_warning(f"MLflow can't be told that the run ended as {state}: {first_line(failure)}")


def send_orphans() -> None:
    """Tell MLflow what dead processes had no time to tell.

    Raises:
        TrainingError: MLflow did not answer in time.
    """
    # A run that starts beside this one waits, and finds nothing left then.
    with step_lock(find_project().home, "orphans"):
        for spool in orphans(_spools()):
            try:
                records, _ = spool.read()
                deliver(client(), spool.run_id, records, spool.folder)
            except (MlflowException, OSError, ValueError) as fault:
                show_warning(
                    f"What run {spool.run_id} had logged when its process died can't be sent "
                    f"({first_line(fault)}); it is dropped"
                )
            spool.remove()


def _spools() -> Path:
    return find_project().home / "spool"


def _now() -> int:
    """Milliseconds, as MLflow counts them."""
    return int(time.time() * 1000)
