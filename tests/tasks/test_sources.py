"""Tests of tasks.sources, on a private copy of the source tree."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plumbline.errors import ParamsError
from plumbline.params.schema import STEP_NAMES
from tasks import sources
from tasks.sources import LIBRARIES, PACKAGES, WATCHERS, function_fingerprint

ROOT = Path(__file__).resolve().parents[2]

# Reads one line, forgets what it knew, and prints every step's fingerprint, again and again.
ASKED = f"""
import json, sys
from tasks import sources
cached = (sources.code_fingerprint, sources.read_sources, sources._imports)
for _ in sys.stdin:
    for function in cached:
        function.cache_clear()
    found = {{s: sources.code_fingerprint(f"tasks.{{s}}") for s in {list(STEP_NAMES)!r}}}
    print(json.dumps([found, "grimp" in sys.modules]), flush=True)
"""


class Tree:
    """A copy of the code, and a process that fingerprints it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tasks", root / "tasks", ignore=ignore)
        shutil.copytree(ROOT / "src" / "plumbline", root / "src" / "plumbline", ignore=ignore)
        (root / "params").mkdir()
        (root / "data.dvc").touch()
        self.home = root / "home"
        self.home.mkdir()
        self.process = self.start()

    def start(self) -> subprocess.Popen[str]:
        path = f"{self.root / 'src'}{os.pathsep}{self.root}"
        return subprocess.Popen(
            [sys.executable, "-B", "-c", ASKED],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": path, "PLUMBLINE_HOME": str(self.home)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def stop(self) -> None:
        self.process.communicate()

    def ask(self) -> tuple[dict[str, dict[str, str]], bool]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found, scanned = json.loads(self.process.stdout.readline())
        return found, scanned

    def fingerprints(self) -> dict[str, dict[str, str]]:
        return self.ask()[0]

    def path(self, module: str) -> Path:
        folder = self.root / ("src" if module.startswith("plumbline") else ".")
        path = folder.joinpath(*module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def modules(self) -> dict[str, Path]:
        found = {}
        for folder in (self.root / "src" / "plumbline", self.root / "tasks"):
            for path in folder.rglob("*.py"):
                name = ".".join(path.relative_to(folder.parent).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = path
        return found

    def edited_by(self, edit: Callable[[], object]) -> set[str]:
        """The steps whose fingerprint an edit changes."""
        before = self.fingerprints()
        edit()
        after = self.fingerprints()
        return {step for step in before if before[step] != after[step]}


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Tree]:
    """One that was never looked at."""
    made = Tree(tmp_path / "code")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    made = Tree(tmp_path_factory.mktemp("shared") / "code")
    made.fingerprints()
    yield made
    made.stop()


@pytest.fixture
def tree(_shared: Tree) -> Iterator[Tree]:
    """One that was scanned already, and is afterwards as it was before."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in _shared.root.rglob("*") if path.is_file()}

    before = files()
    yield _shared
    after = files()
    for path in after.keys() - before.keys():
        path.unlink()
    for path, content in before.items():
        if after.get(path) != content:
            path.write_bytes(content)


def append(path: Path, text: str = "\n# edited\n") -> None:
    """Edit a file, and leave its time as it was."""
    state = path.stat()
    path.write_text(path.read_text() + text)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


# An independent reading of the imports.


class Reading(NamedTuple):
    """What one source file names."""

    modules: set[str]
    libraries: set[str]


@cache
def read_imports(name: str, is_package: bool, source: bytes, modules: frozenset[str]) -> Reading:
    """What a source imports anywhere in it, by its syntax tree alone."""
    package = name if is_package else name.rpartition(".")[0]
    named: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # "from a import b" names the module a.b where there is one, or else a.
            for alias in node.names:
                full = f"{base}.{alias.name}"
                named.add(full if full in modules else base)
    return Reading(named & modules, {name.partition(".")[0] for name in named} & LIBRARIES)


def expected_fingerprint(tree: Tree, step: str) -> dict[str, str]:
    modules = tree.modules()
    sources_of = {name: path.read_bytes() for name, path in modules.items()}
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    known = frozenset(modules)
    reached: set[str] = set()
    libraries: set[str] = set()
    new = {f"tasks.{step}"}
    while new:
        reached |= new
        found: set[str] = set()
        for name in new:
            reading = read_imports(name, name in packages, sources_of[name], known)
            libraries |= reading.libraries
            parts = name.split(".")
            found |= reading.modules | {".".join(parts[:i]) for i in range(1, len(parts))}
        new = found - reached - WATCHERS
    digests = {name: hashlib.sha256(sources_of[name]).hexdigest() for name in reached}
    if "transformers" in libraries:
        libraries |= {"accelerate", "jinja2", "safetensors", "tokenizers"}
    return digests | {name: sources._version(name) for name in libraries}


def test_every_step_is_fingerprinted_by_all_it_can_import(tree):
    found = tree.fingerprints()

    assert found == {step: expected_fingerprint(tree, step) for step in STEP_NAMES}


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(rng=st.randoms(use_true_random=False), edits=st.integers(0, 4))
def test_a_fingerprint_changes_exactly_when_something_in_reach_does(tree, rng, edits):
    names = sorted(tree.modules())
    before = {step: expected_fingerprint(tree, step) for step in STEP_NAMES}
    originals = {}
    for name in rng.sample(names, edits):
        path = tree.path(name)
        originals[path] = path.read_text()
        append(path, random_edit(rng, names))
    after = {step: expected_fingerprint(tree, step) for step in STEP_NAMES}
    found = tree.fingerprints()
    for path, text in originals.items():
        path.write_text(text)

    assert found == after
    assert tree.fingerprints() == before


def random_edit(rng: random.Random, names: list[str]) -> str:
    other = rng.choice(names)
    package, _, name = other.rpartition(".")
    kinds = [
        "\n# a remark\n",
        f"\n\ndef _later():\n    import {other}\n",
        f"\n\nif False:\n    from {package} import {name}\n" if package else f"\nimport {other}\n",
    ]
    return rng.choice(kinds)


# Edits by hand, and the steps that they touch.

MODEL_STEPS = {"base_model", "sft", "reward_model", "judge", "rl", "dpo", "evaluate", "register"}


@pytest.mark.parametrize(
    ("module", "steps"),
    [
        ("plumbline.losses.policy", {"rl"}),
        ("plumbline.losses.value", {"rl"}),
        ("plumbline.losses.dpo", {"dpo"}),
        ("plumbline.losses.preference", {"reward_model", "judge"}),
        ("plumbline.ops.advantages", {"rl"}),
        ("plumbline.data.splits", {"prepare_data"}),
        ("plumbline.evaluation.compare", {"evaluate"}),
        ("tasks.judge", {"judge"}),
        ("tasks.reward_model", {"reward_model", "judge"}),
        ("tasks.model_store", MODEL_STEPS),
        ("tasks.tracking", set(STEP_NAMES)),
        ("plumbline", set(STEP_NAMES)),
        ("plumbline.losses", {"sft", "reward_model", "judge", "rl", "dpo", "evaluate"}),
        *((name, set()) for name in sorted(WATCHERS)),
        ("plumbline.params.loader", set()),
        ("plumbline.params.faults", set()),
    ],
)
def test_an_edit_touches_the_steps_that_can_reach_it(tree, module, steps):
    assert tree.edited_by(lambda: append(tree.path(module))) == steps


def test_an_import_that_happens_late_counts(tree):
    late = "\n\ndef _late() -> None:\n    from plumbline.losses import policy\n"
    append(tree.path("tasks.sft"), late)

    assert tree.edited_by(lambda: append(tree.path("plumbline.losses.policy"))) == {"sft", "rl"}


def test_what_a_package_imports_counts_for_its_modules(tree):
    append(tree.path("plumbline.losses"), "\nimport plumbline.evaluation.style\n")

    touched = tree.edited_by(lambda: append(tree.path("plumbline.evaluation.style")))

    assert {"sft", "rl", "dpo", "reward_model"} <= touched


def test_a_new_module_counts_once_it_is_imported(tree):
    new = tree.root / "src" / "plumbline" / "losses" / "new.py"
    assert tree.edited_by(lambda: new.write_text('"""New."""\n')) == set()

    added = "\nfrom plumbline.losses import new\n"
    assert tree.edited_by(lambda: append(tree.path("plumbline.losses.policy"), added)) == {"rl"}
    assert tree.edited_by(lambda: append(new)) == {"rl"}


def test_a_touch_is_no_edit_and_an_edit_that_is_undone_is_none(tree):
    path = tree.path("plumbline.losses.policy")
    original = path.read_bytes()

    assert tree.edited_by(lambda: os.utime(path)) == set()
    assert tree.edited_by(lambda: append(path)) == {"rl"}
    assert tree.edited_by(lambda: path.write_bytes(original)) == {"rl"}


def test_the_graph_is_scanned_once_while_nothing_changes(fresh):
    assert fresh.ask()[1]
    fresh.stop()
    fresh.process = fresh.start()

    found, scanned = fresh.ask()

    assert not scanned
    assert found == {step: expected_fingerprint(fresh, step) for step in STEP_NAMES}


@pytest.mark.parametrize("content", ["", "[]", '{"sources": 1}', "\x00"], ids=repr)
def test_a_garbled_cache_of_the_graph_is_made_again(tree, content):
    before = tree.fingerprints()
    cache = tree.home / "imports.json"
    good = cache.read_bytes()
    cache.write_text(content)

    assert tree.fingerprints() == before
    assert cache.read_bytes() == good
    assert not list(tree.home.glob(".*"))


def test_without_a_home_nothing_is_written(fresh):
    fresh.home.rmdir()

    assert fresh.fingerprints()["rl"]
    assert not fresh.home.exists()


def test_what_a_step_really_imports_is_in_its_fingerprint():
    code = f"""
import json, os, sys
import mlflow.transformers, pandera.pandas, peft, prefect, torch, transformers
from tasks.sources import WATCHERS, code_fingerprint
for step in {list(STEP_NAMES)!r}:
    reading, writing = os.pipe()
    if not (child := os.fork()):
        __import__(f"tasks.{{step}}")
        loaded = [m for m in sys.modules if m.partition(".")[0] in ("tasks", "plumbline")]
        os.write(writing, json.dumps(loaded).encode())
        os._exit(0)
    os.waitpid(child, 0)
    loaded = set(json.loads(os.read(reading, 65536)))
    watched = set().union(*(code_fingerprint(name) for name in WATCHERS & loaded))
    print(step, sorted(loaded - set(code_fingerprint(f"tasks.{{step}}")) - watched - WATCHERS))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)

    assert done.stdout.splitlines() == [f"{step} []" for step in STEP_NAMES], done.stderr


def test_the_code_reads_no_file_that_is_not_python():
    for package in (ROOT / "tasks", ROOT / "src" / "plumbline"):
        others = [p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
        assert others == []


def test_watchers_and_packages_are_there():
    names = {name.partition(".")[2] for name in WATCHERS}

    assert {"keys", "caching", "progress", "sources"} <= names
    assert all((ROOT / "tasks" / f"{name}.py").is_file() for name in names)
    assert set(PACKAGES) == {"tasks", "plumbline"}


# Libraries.


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What importlib.metadata says of installed packages; to be changed."""
    stated = dict.fromkeys(LIBRARIES, "1.0")
    monkeypatch.setattr(sources, "version", stated.__getitem__)
    caches: tuple[Any, ...] = (sources._version, sources.code_fingerprint)
    for function in caches:
        function.cache_clear()
    yield stated
    for function in caches:
        function.cache_clear()


def test_the_version_of_a_library_counts_where_it_is_used(versions):
    before = {step: sources.code_fingerprint(f"tasks.{step}") for step in STEP_NAMES}
    assert before["rl"]["torch"] == "1.0"
    assert "torch" not in before["rl"].keys() - LIBRARIES

    versions["peft"] = "1.1"
    for function in (sources._version, sources.code_fingerprint):
        function.cache_clear()
    after = {step: sources.code_fingerprint(f"tasks.{step}") for step in STEP_NAMES}

    changed = {step for step in STEP_NAMES if before[step] != after[step]}
    assert {"rl", "dpo"} <= changed
    assert "prepare_data" not in changed


def test_the_build_of_a_library_does_not_count(versions):
    versions["torch"] = "2.13.0+cu128"

    assert sources._version("torch") == "2.13.0"


# Functions that the params name, outside the project.


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, with rewards.py, what it imports, and what it does not."""
    files = {
        "my_rewards.py": "import json\nimport my_words\nfrom my_lib import lists\n",
        "my_words.py": "def f():\n    from my_late import g\n",
        "my_late.py": "import plumbline.errors\n",
        "my_lib/__init__.py": "from . import base\n",
        "my_lib/base.py": "",
        "my_lib/lists.py": "import torch\nfrom .base import x\n",
        "my_lib/unused.py": "",
        "my_other.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    function_fingerprint.cache_clear()
    yield tmp_path
    function_fingerprint.cache_clear()


def test_a_function_outside_counts_with_what_it_imports(outside):
    code = function_fingerprint("my_rewards:length")

    inside = {name for name in code if name.startswith("plumbline")}
    assert set(code) - inside == {
        "my_rewards", "my_words", "my_late", "my_lib", "my_lib.base", "my_lib.lists",
    }  # fmt: skip
    assert "plumbline.errors" in inside
    assert code["my_late"] == hashlib.sha256((outside / "my_late.py").read_bytes()).hexdigest()
    assert not {"my_rewards", "my_lib"} & sys.modules.keys()


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("my_rewards.py", True),
        ("my_words.py", True),
        ("my_late.py", True),
        ("my_lib/__init__.py", True),
        ("my_lib/base.py", True),
        ("my_lib/lists.py", True),
        ("my_lib/unused.py", False),
        ("my_other.py", False),
    ],
)
def test_an_edit_outside_counts_where_the_function_can_reach_it(outside, file, counts):
    before = function_fingerprint("my_rewards.length")
    append(outside / file)
    function_fingerprint.cache_clear()

    assert (function_fingerprint("my_rewards.length") != before) == counts


def test_a_function_of_an_installed_package_counts_with_its_own_package_alone():
    code = function_fingerprint("json.encoder:encode_basestring")

    assert {"json", "json.encoder", "json.decoder"} <= set(code)
    assert "re" not in code


def test_a_function_that_was_edited_since_it_was_noted_is_named(tmp_path, monkeypatch):
    module = tmp_path / "rewards_of_the_user.py"
    module.write_text("def score(prompt, text):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sources, "_outside", {})
    sources.note_functions({"rewards_of_the_user:score": "rl.rewards"})
    assert sources.edited_sources() == []
    module.write_text("def score(prompt, text):\n    return 2.0\n")

    assert sources.edited_sources() == ["rewards_of_the_user"]


def test_a_function_that_is_not_there_is_named_with_its_param():
    with pytest.raises(ParamsError, match=r"^rl\.rewards: expected .*'no_such_module:f'"):
        sources.note_functions({"no_such_module:f": "rl.rewards"})


def test_every_library_is_in_the_key_of_a_step():
    reached = {name for step in STEP_NAMES for name in sources.code_fingerprint(f"tasks.{step}")}

    assert reached >= LIBRARIES


def test_a_function_of_the_project_counts_with_its_closure():
    code = function_fingerprint("plumbline.evaluation.principles:gold_score")

    assert code == sources.code_fingerprint("plumbline.evaluation.principles")


@pytest.mark.parametrize(
    "name", ["no_such_module:f", "json.no_such:f", "plumbline.no_such:f", "json.tool.x:f"]
)
def test_a_function_of_no_module_is_refused(name):
    with pytest.raises(ParamsError, match="can be imported"):
        function_fingerprint(name)


def test_a_module_that_is_not_there_has_no_fingerprint():
    with pytest.raises(ImportError, match=r"no source for tasks\.nothing"):
        sources.code_fingerprint("tasks.nothing")
