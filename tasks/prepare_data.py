"""Step prepare_data: the user's files, validated, split and written as parquet."""

import hashlib
import json
import tempfile
from pathlib import Path

from prefect import task
from prefect.artifacts import create_table_artifact

from plumbline.artifacts import write_manifest
from plumbline.data.formats import Failure
from plumbline.data.prepare import prepare
from plumbline.data.validation import InvalidData, failures_table
from plumbline.params.schema import DataParams, ModelParams
from plumbline.project import find_project
from plumbline.refs import DataRef, DataVersion, PreparedData, SplitRef, file_digest
from tasks import tracking
from tasks.caching import step_options
from tasks.data_version import snapshot
from tasks.validation import limits_of, token_counter

ROWS_OF_THE_ARTIFACT = 200
"""The Prefect page shows so many failures; the MLflow artifact has them all."""


@task(name="prepare_data", **step_options)
def prepare_data(
    data: DataVersion, params: DataParams, model: ModelParams, run: tracking.PipelineRun
) -> PreparedData:
    """Validate the data set against the rules and the model's limits, split it, and store it."""
    project = find_project()

    with (
        tracking.step_run(run, "prepare_data", params.model_dump()) as tracked,
        tempfile.TemporaryDirectory() as temporary,
    ):
        out = Path(temporary, "prepared")
        try:
            prepared = prepare(
                snapshot(project.root, data, Path(temporary)),
                out,
                test_fraction=params.test_fraction,
                on_invalid=params.on_invalid,
                limits=limits_of(params),
                counter_for=token_counter(model, project.root),
                long_prompts=params.long_prompts,
            )
        except InvalidData as error:
            _report(tracked, error.failures)
            raise
        if prepared.failures:
            _report(tracked, prepared.failures)
        write_manifest(out)
        uri = tracked.folder(out, "prepared")
        tables = {
            name: SplitRef(
                train=_data_ref(out, uri, f"{name}/train", prepared.rows),
                test=_data_ref(out, uri, f"{name}/test", prepared.rows),
            )
            for name in ("demonstrations", "preferences", "prompts", "ratings")
            if f"{name}/train" in prepared.rows
        }
        metrics = {f"data/{name}_rows": float(rows) for name, rows in prepared.rows.items()}
        metrics |= {
            "data/failures": float(len(prepared.failures)),
            "data/quarantined_rows": float(prepared.quarantined),
            "data/cut_rows": float(sum(prepared.cut.values())),
            "data/merged_rows": float(prepared.merged),
        }
        tracked.finals(metrics)
        tracked.dataset(data.path, data.digest, data.path, sum(prepared.rows.values()), "source")
        return PreparedData(
            digest=_digest_of(tables),
            uri=uri,
            mlflow_run_id=tracked.run_id,
            metrics=metrics,
            figures=tracked.figures,
            figure_digests=tracked.figure_digests,
            seconds=tracked.seconds,
            **tables,
        )


def _data_ref(out: Path, uri: str, name: str, rows: dict[str, int]) -> DataRef:
    digest = file_digest(out / f"{name}.parquet")
    return DataRef(digest=digest, uri=f"{uri}/{name}.parquet", rows=rows[name])


def _digest_of(tables: dict[str, SplitRef]) -> str:
    parts = {name: [table.train.digest, table.test.digest] for name, table in tables.items()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _report(tracked: tracking.StepRun, failures: list[Failure]) -> None:
    rows = failures_table(failures)
    tracked.table("validation", rows)
    create_table_artifact(
        table=rows[:ROWS_OF_THE_ARTIFACT],
        key="validation",
        description=f"{len(rows)} rows of the data break a rule",
    )
