"""Tests of flows.storage on a real SQLite store, with models of a byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.storage import housekeeping
from flows.storage.housekeeping import Waste, collect, find_waste, waste_table
from flows.storage.verifying import verify_everything
from plumbline.artifacts import DigestCache, digest_of, partial_folder, write_manifest
from plumbline.errors import MachineError
from plumbline.process import identity
from plumbline.project import Project
from plumbline.refs import ModelRef, RegistrationRef, StepResult
from tasks.keys import Ingredients
from tasks.locks import step_lock
from tasks.mlflow_client import client
from tasks.records import ADAPTED, SERIALIZER, content_digest, local_path, write_ingredients

HOUR = 3600.0
POLICY = "plumbline-policy"


class Store:
    """Runs, models and results as pipelines leave them."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.mlflow = MlflowClient()
        location = (project.home / "mlartifacts").as_uri()
        self.experiment = self.mlflow.create_experiment("project", artifact_location=location)
        self.clock = int(time.time() * 1000)

    def pipeline(self, status: str = "FINISHED") -> str:
        """A pipeline's run; each is newer than the one before."""
        return self._run({"plumbline.kind": "pipeline"}, status)

    def step(
        self,
        pipeline: str,
        key: str,
        *,
        status: str = "FINISHED",
        record: bool = True,
        adapts: ModelRef | None = None,
    ) -> ModelRef:
        """A step that made a model and a figure; its record is written unless told otherwise."""
        tags = {"plumbline.kind": "step", "mlflow.parentRunId": pipeline}
        tags |= {"plumbline.key": key} if record else {}
        run_id = self._run(tags, status)
        logged = self.mlflow.create_logged_model(
            self.experiment, name=key.rpartition("-")[0], source_run_id=run_id
        )
        folder = local_path(logged.artifact_location)
        assert folder is not None
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "model.safetensors").write_text(key)
        if adapts is not None:
            adapted = {"uri": adapts.uri, "digest": adapts.digest}
            (folder / ADAPTED).write_text(json.dumps(adapted))
        digest = content_digest(write_manifest(folder))
        self.mlflow.finalize_logged_model(logged.model_id, "READY")
        figure = self.files(run_id) / "curves.png"
        figure.write_text("picture")
        result = ModelRef(
            digest=digest,
            uri=logged.artifact_location,
            mlflow_run_id=run_id,
            mlflow_model_id=logged.model_id,
            figures={"curves.png": figure.as_uri()},
            figure_digests={"curves.png": digest_of(figure)},
        )
        if record:
            self.record(key, result)
        return result

    def unfinished(self, pipeline: str, status: str) -> str:
        """The id of a model in whose midst the step's process was killed, or still is."""
        tags = {"plumbline.kind": "step", "mlflow.parentRunId": pipeline}
        logged = self.mlflow.create_logged_model(
            self.experiment, name="rl", source_run_id=self._run(tags, status)
        )
        folder = local_path(logged.artifact_location)
        assert folder is not None
        partial_folder(folder).mkdir(parents=True)
        (partial_folder(folder) / "half").write_text("half")
        return str(logged.model_id)

    def cached(self, pipeline: str, key: str, source: ModelRef) -> None:
        """The stub of a step that another pipeline had run."""
        tags = {
            "plumbline.kind": "step",
            "mlflow.parentRunId": pipeline,
            "plumbline.key": key,
            "cache.source_run_id": source.mlflow_run_id,
        }
        self._run(tags, "FINISHED")

    def register(self, pipeline: str, key: str, model: ModelRef, *aliases: str) -> RegistrationRef:
        """A registered version of a model, with its record."""
        if not self.mlflow.search_registered_models():
            self.mlflow.create_registered_model(POLICY)
        made = self.mlflow.create_model_version(
            POLICY,
            source=f"models:/{model.mlflow_model_id}",
            run_id=model.mlflow_run_id,
            model_id=model.mlflow_model_id,
            tags={"plumbline.run_id": pipeline, "plumbline.digest": model.digest},
        )
        for alias in aliases:
            self.mlflow.set_registered_model_alias(POLICY, alias, made.version)
        tags = {"plumbline.kind": "step", "mlflow.parentRunId": pipeline, "plumbline.key": key}
        result = RegistrationRef(
            digest=model.digest,
            uri=model.uri,
            mlflow_run_id=self._run(tags, "FINISHED"),
            name=POLICY,
            version=str(made.version),
        )
        self.record(key, result)
        return result

    def record(self, key: str, result: StepResult) -> None:
        """What Prefect writes of a finished step, and what the step was made of."""
        data = {
            "__class__": f"plumbline.refs.{type(result).__name__}",
            "data": result.model_dump(mode="json"),
        }
        stored = {"metadata": {"serializer": SERIALIZER}, "result": json.dumps(data)}
        self.project.results.mkdir(exist_ok=True)
        (self.project.results / key).write_text(json.dumps(stored))
        write_ingredients(self.project.home, key, Ingredients({}, {}, {}))

    def files(self, run_id: str) -> Path:
        """The folder of a run's artifacts."""
        folder = self.project.home / "mlartifacts" / run_id / "artifacts"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def end(self, run_id: str, status: str) -> None:
        self.mlflow.set_terminated(run_id, status)

    def knows_model(self, model: ModelRef) -> bool:
        try:
            self.mlflow.get_logged_model(model.mlflow_model_id)
        except MlflowException:
            return False
        return True

    def versions(self) -> list[str]:
        return sorted(str(version.version) for version in self.mlflow.search_model_versions())

    def _run(self, tags: dict[str, str], status: str) -> str:
        self.clock += 1000
        run = self.mlflow.create_run(self.experiment, start_time=self.clock, tags=tags)
        if status != "RUNNING":
            self.mlflow.set_terminated(run.info.run_id, status)
        return str(run.info.run_id)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database, which takes seconds to make and nothing to copy."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    home = tmp_path / ".plumbline"
    home.mkdir()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{home / 'mlflow.db'}")
    client.cache_clear()
    yield Project(tmp_path, home)
    mlflow.set_tracking_uri(before)
    client.cache_clear()


@pytest.fixture
def store(project: Project, empty_database: Path) -> Store:
    shutil.copyfile(empty_database, project.home / "mlflow.db")
    return Store(project)


def tree(folder: Path) -> dict[str, bytes]:
    """All files but the database and its companions, which a look at it may touch."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("mlflow.db")
    }


def listed(waste: list[Waste]) -> dict[tuple[str, str], str]:
    """Why each thing is listed."""
    return {(one.kind, one.name): one.why for one in waste}


def folder_of(model: ModelRef) -> Path:
    path = local_path(model.uri)
    assert path is not None
    return path.parent


def grow_old(path: Path) -> None:
    past = time.time() - 2 * HOUR
    os.utime(path, (past, past), follow_symlinks=False)


# gc: what is listed.


def test_a_project_that_never_ran_has_nothing_to_remove(project):
    assert find_waste(project) == []
    assert list(project.home.iterdir()) == []


def test_what_finished_runs_left_stays(project, store):
    first = store.pipeline()
    sft, rl = store.step(first, "sft-1"), store.step(first, "rl-1")
    store.register(first, "register-1", rl, "challenger")
    second = store.pipeline()
    store.cached(second, "sft-1", sft)
    store.files(first).joinpath("report.md").write_text("report")

    assert find_waste(project) == []
    assert find_waste(project, keep_last=2) == []
    assert find_waste(project, keep_last=5) == []


def test_what_a_killed_process_left_is_an_orphan(project, store):
    killed = store.pipeline("KILLED")
    finished = store.step(killed, "sft-1")
    half = store.unfinished(killed, "KILLED")
    unrecorded = store.step(killed, "rl-1", record=False, status="KILLED")

    waste = find_waste(project)

    assert listed(waste) == {
        ("model", half): "rl: was never finished",
        ("model", unrecorded.mlflow_model_id): "rl: no kept run refers to it",
    }
    assert {one.size for one in waste} >= {len("half")}
    collect(project, delete=True)
    assert find_waste(project) == []
    assert folder_of(finished).exists()
    assert not folder_of(unrecorded).exists()
    assert not (project.home / "mlartifacts" / "models" / half).exists()
    assert store.mlflow.search_logged_models([store.experiment])[0].status == "READY"


def test_what_a_running_process_writes_stays(project, store):
    alive = store.pipeline("RUNNING")
    half = store.unfinished(alive, "RUNNING")
    store.step(alive, "sft-1", record=False)

    assert find_waste(project) == []
    assert find_waste(project, keep_last=1) == []
    assert (project.home / "mlartifacts" / "models" / half).exists()


def test_files_that_nothing_knows_are_orphans(project, store):
    pipeline = store.pipeline()
    store.step(pipeline, "sft-1")
    stray_model = project.home / "mlartifacts" / "models" / "m-0123"
    stray_model.mkdir()
    stray_run = project.home / "mlartifacts" / ("0" * 32)
    stray_run.mkdir()
    (stray_run / "big").write_bytes(b"x" * 1000)
    (project.results / "rl-1").write_text("{")
    deleted = store.pipeline()
    store.files(deleted)
    store.mlflow.delete_run(deleted)

    waste = find_waste(project)

    assert listed(waste) == {
        ("record", "rl-1"): "can't be read",
        ("model", "m-0123"): "MLflow does not know it",
        ("files", "0" * 32): "MLflow knows no such run",
        ("files", deleted): "MLflow knows no such run",
    }
    assert {one.size for one in waste if one.name == "0" * 32} == {1000}


def test_checkpoints_of_finished_steps_and_old_files_aside_are_left_over(project, store):
    pipeline = store.pipeline()
    store.step(pipeline, "sft-1")
    aside = [
        project.home / "ingredients" / ".sft-1.4711",
        project.home / ".digests.json.4711",
        project.home / ".writable-4711",
        project.home / "reports" / ".tmpx",
        project.results / "4ba98bd7333f40db9cd55a5bdd9732cf",
        project.home / "ingredients" / "rl-9.json",
    ]
    for path in aside:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    for key in ("sft-1", "rl-1"):
        (project.home / "checkpoints" / key).mkdir(parents=True)
        (project.home / "checkpoints" / key / "state.json").write_text("{}")

    assert listed(find_waste(project)) == {("checkpoints", "sft-1"): "its step is finished"}
    for path in aside:
        grow_old(path)
    names = {path.relative_to(project.home).as_posix() for path in aside}
    assert {one.name for one in find_waste(project)} == {*names, "sft-1"}

    collect(project, delete=True)

    assert not any(path.exists() for path in aside)
    assert [path.name for path in (project.home / "checkpoints").iterdir()] == ["rl-1"]


# gc --keep-last.


def test_what_only_older_runs_refer_to_goes_and_their_runs_stay(project, store):
    old, new = store.pipeline(), store.pipeline()
    sft, old_rl = store.step(old, "sft-1"), store.step(old, "rl-1")
    store.cached(new, "sft-1", sft)
    new_rl = store.step(new, "rl-2")
    store.mlflow.log_metric(old_rl.mlflow_run_id, "rl/objective/kl", 0.5)
    before = tree(project.home)

    waste = collect(project, 1, delete=False)

    assert listed(waste) == {
        ("record", "rl-1"): "no kept run refers to it",
        ("model", old_rl.mlflow_model_id): "rl: no kept run refers to it",
        ("files", old_rl.mlflow_run_id): "no kept run refers to it",
    }
    assert tree(project.home) == before
    assert store.knows_model(old_rl)
    removed = collect(project, 1, delete=True)
    assert {one[:3] for one in removed} == {one[:3] for one in waste}
    assert sum(one.size for one in removed) == sum(one.size for one in waste) > 0
    assert find_waste(project, 1) == []
    assert [folder_of(model).exists() for model in (sft, old_rl, new_rl)] == [True, False, True]
    assert [store.knows_model(model) for model in (sft, old_rl, new_rl)] == [True, False, True]
    assert sorted(path.name for path in project.results.iterdir()) == ["rl-2", "sft-1"]
    assert store.mlflow.get_run(old_rl.mlflow_run_id).data.metrics == {"rl/objective/kl": 0.5}
    assert verify_everything(project).damaged == []


def test_what_an_alias_points_to_stays_with_its_record_and_other_versions_go(project, store):
    models = []
    for number in range(3):
        pipeline = store.pipeline()
        models.append(store.step(pipeline, f"rl-{number}"))
        aliases = ("champion",) if number == 0 else ()
        store.register(pipeline, f"register-{number}", models[-1], *aliases)

    collect(project, 1, delete=True)

    assert [folder_of(model).exists() for model in models] == [True, False, True]
    assert store.versions() == ["1", "3"]
    names = sorted(path.name for path in project.results.iterdir())
    assert names == ["register-0", "register-2", "rl-0", "rl-2"]
    assert verify_everything(project).damaged == []


def test_the_model_that_a_kept_adapter_changes_stays(project, store):
    old = store.pipeline()
    sft = store.step(old, "sft-1")
    adapter = store.step(old, "rl-1", adapts=sft)
    store.register(old, "register-1", adapter, "champion")
    store.step(store.pipeline(), "sft-2")

    waste = find_waste(project, 1)

    assert ("record", "sft-1") in listed(waste)
    collect(project, 1, delete=True)
    assert folder_of(sft).exists()
    assert folder_of(adapter).exists()
    assert verify_everything(project).damaged == []


def test_while_a_run_is_alive_every_result_stays(project, store):
    store.step(store.pipeline(), "rl-1")
    store.step(store.pipeline(), "rl-2")
    alive = store.pipeline("RUNNING")

    assert find_waste(project, 1) == []
    store.end(alive, "FAILED")
    assert {one.name for one in find_waste(project, 1) if one.kind == "record"} == {"rl-1"}


def test_a_run_whose_process_is_dead_holds_nothing(project, store):
    with subprocess.Popen(
        [sys.executable, "-c", "from plumbline.process import identity; print(identity())"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        dead = process.communicate()[0].strip()
    store.step(store.pipeline(), "rl-1")
    open_run = store.pipeline("RUNNING")
    store.mlflow.set_tag(open_run, "plumbline.process", dead)
    half = store.unfinished(open_run, "RUNNING")
    child = store.mlflow.get_logged_model(half).source_run_id
    store.mlflow.set_tag(child, "plumbline.process", dead)
    store.step(store.pipeline(), "rl-2")

    assert listed(find_waste(project))["model", half] == "rl: was never finished"
    assert ("record", "rl-1") in listed(find_waste(project, 1))
    store.mlflow.set_tag(open_run, "plumbline.process", identity())
    assert ("record", "rl-1") not in listed(find_waste(project, 1))


def test_what_an_interrupted_run_had_finished_stays_while_it_is_younger(project, store):
    store.step(store.pipeline(), "rl-1")
    killed = store.pipeline("KILLED")
    store.step(killed, "sft-2")
    (project.home / "checkpoints" / "rl-2").mkdir(parents=True)

    assert find_waste(project, 1) == []
    store.clock += int(1000 * HOUR)
    store.step(store.pipeline(), "rl-3")
    found = listed(find_waste(project, 1))
    assert {name for kind, name in found if kind == "record"} == {"rl-1", "sft-2"}
    assert found["checkpoints", "rl-2"] == "nobody went on from it since the kept runs began"


def test_reproductions_go_with_their_runs(project, store):
    old, new = store.pipeline(), store.pipeline()
    folder = project.home / "reproduce"
    for name in (old, new, "0" * 32, f".{old}-4711"):
        (folder / name / "project").mkdir(parents=True)

    assert listed(find_waste(project)) == {("reproduction", "0" * 32): "MLflow does not know it"}
    found = listed(find_waste(project, 1))
    assert found["reproduction", old] == "its run is not kept"
    assert ("reproduction", new) not in found
    grow_old(folder / f".{old}-4711")
    with step_lock(project.home, f"reproduce-{old}"):
        collect(project, 1, delete=True)
        assert {path.name for path in folder.iterdir()} == {old, new}
    collect(project, 1, delete=True)
    assert [path.name for path in folder.iterdir()] == [new]


def test_a_result_whose_step_is_at_work_is_left_alone(project, store):
    old = store.step(store.pipeline(), "rl-1")
    store.step(store.pipeline(), "rl-2")

    with step_lock(project.home, "rl-1"):
        collect(project, 1, delete=True)

        assert (project.results / "rl-1").exists()
        assert folder_of(old).exists()
    assert collect(project, 1, delete=True)
    assert not folder_of(old).exists()


@pytest.mark.parametrize("ended", [False, True])
def test_a_run_that_takes_a_result_meanwhile_keeps_it(project, store, monkeypatch, ended):
    """It found the record after gc had made its list, and before gc removed it."""
    old = store.step(store.pipeline(), "rl-1")
    store.step(store.pipeline(), "rl-2")
    remove_record = housekeeping._remove_record

    def hit_first(*arguments: Any) -> bool:
        pipeline = store.pipeline("RUNNING")
        if ended:
            store.cached(pipeline, "rl-1", old)
            store.end(pipeline, "FINISHED")
        return remove_record(*arguments)

    monkeypatch.setattr(housekeeping, "_remove_record", hit_first)
    collect(project, 1, delete=True)

    assert not (project.results / "rl-1").exists()
    assert folder_of(old).exists()
    assert store.knows_model(old)
    assert (store.files(old.mlflow_run_id) / "curves.png").exists()


def test_a_live_run_keeps_what_it_took_although_its_record_went(project, store):
    old = store.step(store.pipeline(), "rl-1")
    store.step(store.pipeline(), "rl-2")
    store.cached(store.pipeline("RUNNING"), "rl-1", old)
    (project.results / "rl-1").unlink()

    collect(project, 1, delete=True)

    assert store.knows_model(old)
    assert folder_of(old).exists()
    assert (store.files(old.mlflow_run_id) / "curves.png").exists()


def test_an_attempt_that_failed_leaves_no_model_though_its_run_finished(project, store):
    pipeline = store.pipeline()
    failed = store.step(pipeline, "rl-1", status="FAILED", record=False)
    made = store.step(pipeline, "rl-1")

    assert [one.name for one in find_waste(project)] == [failed.mlflow_model_id]
    assert folder_of(made).exists()


def test_a_record_that_was_half_written_may_be_whole_by_now(project, store, monkeypatch):
    model = store.step(store.pipeline(), "rl-1")
    whole = (project.results / "rl-1").read_bytes()
    (project.results / "rl-1").write_bytes(whole[:40])
    remove_record = housekeeping._remove_record

    def finish_first(*arguments: Any) -> bool:
        (project.results / "rl-1").write_bytes(whole)
        return remove_record(*arguments)

    monkeypatch.setattr(housekeeping, "_remove_record", finish_first)
    collect(project, delete=True)

    assert (project.results / "rl-1").read_bytes() == whole
    assert folder_of(model).exists()


def test_a_second_gc_is_refused(project, store):
    with step_lock(project.home, "gc"), pytest.raises(MachineError, match="Another gc"):
        collect(project, delete=True)


@pytest.mark.parametrize("delete", [False, True])
def test_a_shared_store_is_refused(project, store, delete, monkeypatch):
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "http://me:pw@mlflow.example:5000")

    with pytest.raises(MachineError, match=r"expected MLFLOW_TRACKING_URI.*got http://mlflow"):
        collect(project, delete=delete)


def test_a_home_that_was_moved_does_not_lose_its_models(project, store, tmp_path):
    """The database names the old place; ids tell what belongs together."""
    pipeline = store.pipeline()
    model = store.step(pipeline, "rl-1")
    link = tmp_path / "moved"
    link.symlink_to(project.home)

    assert find_waste(Project(tmp_path, link)) == []
    assert folder_of(model).exists()


def test_the_table_has_what_why_and_the_sum():
    waste = [Waste("model", "m-1", "why not", size=1_500_000), Waste("files", "f", "gone", size=1)]

    table = waste_table(waste)

    what, why, size = ([str(cell) for cell in column.cells] for column in table.columns)
    assert (what[0], why[0], size[0]) == ("model m-1", "why not", "1.5 MB")
    assert "2 in all" in what[-1]
    assert "1.5 MB" in size[-1]


# verify.


@pytest.fixture
def trained(store: Store) -> ModelRef:
    pipeline = store.pipeline()
    store.step(pipeline, "sft-1")
    rl = store.step(pipeline, "rl-1")
    store.register(pipeline, "register-1", rl, "challenger")
    return rl


def damage_of(project: Project) -> list[str]:
    return [damage.what for damage in verify_everything(project).damaged]


def test_what_is_whole_is_counted(project, trained):
    found = verify_everything(project)

    assert found.damaged == []
    assert found.looked_at == {"results": 3, "other models": 0, "registered versions": 1}


def test_a_project_that_never_ran_is_whole(project):
    assert verify_everything(project).damaged == []
    assert list(project.home.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (Path.unlink, "is gone"),
        (lambda path: path.write_text("rl"), "was cut short: expected 4 bytes, got 2 bytes"),
        (lambda path: path.write_text("rl-2"), "does not match its digest: expected sha256"),
    ],
    ids=["deleted", "truncated", "altered"],
)
def test_a_damaged_model_is_named_with_all_that_need_it(
    project: Project, trained: ModelRef, damage: Callable[[Path], Any], what: str
) -> None:
    path = folder_of(trained) / "artifacts" / "model" / "model.safetensors"
    damage(path)

    (found,) = verify_everything(project).damaged

    assert found.what.startswith(f"{path} {what}")
    assert found.owners == ["register-1", "rl-1", f"{POLICY}/1 @challenger"]
    assert "run the experiment again" in found.advice


def test_digests_that_are_remembered_are_not_believed(project, trained):
    path = folder_of(trained) / "artifacts" / "model" / "model.safetensors"
    cache = DigestCache(project.home / "digests.json")
    known = path.stat(), cache(path)
    path.write_text("rl-2")
    state = path.stat()
    entry = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, known[1]]
    (project.home / "digests.json").write_text(json.dumps({str(path): entry}))
    assert DigestCache(project.home / "digests.json")(path) == known[1]

    assert len(damage_of(project)) == 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\x80\x04\x95", json.dumps({"metadata": {}}).encode()]
)
def test_a_record_that_can_t_be_read_is_named(project, trained, content):
    (project.results / "sft-1").write_bytes(content)

    assert damage_of(project)[0] == (
        f"{project.results / 'sft-1'} can't be read: expected a JSON record of a ModelRef, got "
        f"{len(content)} bytes of something else"
    )


def test_a_damaged_figure_is_named(project, store, trained):
    path = store.files(trained.mlflow_run_id) / "curves.png"
    path.write_text("pictura")

    (what,) = damage_of(project)
    assert what.startswith(f"{path} does not match its digest")


def test_a_version_whose_model_mlflow_forgot_is_named(project, store, trained):
    store.mlflow.delete_logged_model(trained.mlflow_model_id)

    (found,) = verify_everything(project).damaged
    assert found.what == f"logged model {trained.mlflow_model_id} is gone from MLflow"
    assert found.owners == [f"{POLICY}/1 @challenger"]


def test_a_version_that_is_gone_from_the_registry_is_named(project, store, trained):
    store.mlflow.delete_model_version(POLICY, "1")

    assert damage_of(project) == [f"version 1 of {POLICY} is gone from the registry"]


def test_a_model_that_no_result_names_is_looked_at_too(project, store, trained):
    other = store.step(store.pipeline(), "rl-2", record=False)
    path = folder_of(other) / "artifacts" / "model" / "model.safetensors"
    path.write_text("r")

    (found,) = verify_everything(project).damaged
    assert found.what.startswith(f"{path} was cut short")
    assert found.owners == [other.mlflow_model_id]


def test_the_model_under_a_registered_adapter_is_looked_at(project, store):
    pipeline = store.pipeline()
    sft = store.step(pipeline, "sft-1")
    adapter = store.step(pipeline, "rl-1", adapts=sft)
    store.register(pipeline, "register-1", adapter, "challenger")
    path = folder_of(sft) / "artifacts" / "model" / "model.safetensors"
    path.unlink()

    (found,) = verify_everything(project).damaged
    assert found.owners == ["register-1", "rl-1", "sft-1", f"{POLICY}/1 @challenger"]


def test_the_model_under_an_adapter_s_result_is_needed_by_it(project, store):
    pipeline = store.pipeline()
    sft = store.step(pipeline, "sft-1", record=False)
    store.step(pipeline, "rl-1", adapts=sft)
    path = folder_of(sft) / "artifacts" / "model" / "model.safetensors"
    path.write_text("SFT-1")

    (found,) = verify_everything(project).damaged
    assert found.owners == ["rl-1"]
    assert "runs again" in found.advice


def test_what_others_registered_in_the_same_store_is_none_of_the_project_s(project, store):
    experiment = store.mlflow.create_experiment("a notebook's")
    logged = store.mlflow.create_logged_model(experiment, name="theirs")
    store.mlflow.create_registered_model("theirs")
    store.mlflow.create_model_version("theirs", f"models:/{logged.model_id}")

    assert collect(project, 1, delete=True) == []
    assert len(store.versions()) == 1
    assert verify_everything(project).damaged == []
