"""The code that a step can reach: the source digest of each module, the version of each library.

Imports no framework and none of the modules that it looks at.
"""

import ast
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, resolve_name
from itertools import accumulate
from pathlib import Path

from plumbline.errors import ParamsError
from plumbline.functions import load_function, split_name
from plumbline.project import find_project

PACKAGES = ("tasks", "plumbline")
"""Where the code of the steps is."""

WATCHERS = {
    "tasks.caching",
    "tasks.delivery",
    "tasks.faults",
    "tasks.keys",
    "tasks.locks",
    "tasks.mlflow_client",
    "tasks.progress",
    "tasks.sources",
    "tasks.spool",
    "tasks.templates",
}
"""Modules that find, guard or show results and that no result passes through: not in a key."""

LIBRARIES = {
    "accelerate",
    "gguf",
    "jinja2",
    "numpy",
    "pandas",
    "peft",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
}
"""Installed packages that compute what a step brings out; their versions count."""

BEHIND = {"transformers": {"accelerate", "jinja2", "safetensors", "tokenizers"}}
"""Libraries that another one computes with, where our modules import that one alone."""


@cache
def code_fingerprint(module: str) -> dict[str, str]:
    """What importing `module` of the project can run: sha256 by module, version by library.

    Imports inside functions count, and so do the packages above a module, with their imports:
    importing it runs them.

    Raises:
        ImportError: the project has no such module.
    """
    sources, imports = read_sources(), _imports()
    if module not in sources:
        raise ImportError(f"no source for {module}: expected a module of {' or '.join(PACKAGES)}")
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in reached or (name in WATCHERS and name != module):
            continue
        reached.add(name)
        waiting += [package] if (package := name.rpartition(".")[0]) else []
        waiting += imports.get(name, ())
    for library in reached & BEHIND.keys():
        reached |= BEHIND[library]
    modules = {name: sources[name] for name in sorted(reached & sources.keys())}
    return modules | {name: _version(name) for name in sorted(reached & LIBRARIES)}


def note_functions(functions: Mapping[str, str]) -> None:
    """Read the code of functions before it is imported, so that a key is made of what runs.

    Args:
        functions: as the params name them, each with its field (`Params.functions`).

    Raises:
        ParamsError: one can't be found, or its source can't.
    """
    for function, param in functions.items():
        try:
            function_fingerprint(function)
        except ParamsError as error:
            # Why it can't be imported, Python says best.
            load_function(function, param)
            raise ParamsError(f"{param}: {error}") from None


@cache
def function_fingerprint(function: str) -> dict[str, str]:
    """The code that a function named by the params can reach.

    Of a module outside the project count itself and what it imports, except for what is installed
    in packages other than its own.

    Raises:
        ParamsError: its module can't be found.
    """
    module, _ = split_name(function)
    inside = module.partition(".")[0] in PACKAGES
    if module not in read_sources() if inside else _locate(module) is None:
        raise ParamsError(f"expected module:function that can be imported, got {function!r}")
    if inside:
        return code_fingerprint(module)
    _outside[module] = _outside_fingerprint(module)
    return _outside[module]


_outside: dict[str, dict[str, str]] = {}
"""What the fingerprints of this process say of the modules that functions outside are in."""


@cache
def read_sources() -> dict[str, str]:
    """sha256 of each module of the project, as it was when this process first asked."""
    return _read_sources()


def edited_sources() -> list[str]:
    """Modules whose file is no longer what the fingerprints of this process say."""
    looks = [(read_sources(), _read_sources())]
    looks += [(before, _outside_fingerprint(module)) for module, before in _outside.items()]
    return sorted(
        name
        for before, now in looks
        for name in {*before, *now}
        if before.get(name) != now.get(name)
    )


def _read_sources() -> dict[str, str]:
    sources = {}
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"no source for {package}: expected a package")
        folder = Path(next(iter(spec.submodule_search_locations)))
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            sources[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return sources


@cache
def _imports() -> dict[str, list[str]]:
    """What each module of the project imports; kept on disk while no source changes."""
    listing = json.dumps(read_sources(), sort_keys=True)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    path = find_project().home / "imports.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(path.read_bytes())
        if stored["sources"] == digest:
            return {name: list(imported) for name, imported in stored["imports"].items()}
    imports = _scan_imports()
    # A plan makes no folder; and a file that was edited during the scan would count as scanned.
    if path.parent.is_dir() and not edited_sources():
        with suppress(OSError):
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            aside.write_text(json.dumps({"sources": digest, "imports": imports}))
            aside.replace(path)
    return imports


def _scan_imports() -> dict[str, list[str]]:
    import grimp

    # Its own cache goes by a file's time alone, which an edit can leave as it was.
    graph = grimp.build_graph(*PACKAGES, include_external_packages=True, cache_dir=None)
    known = read_sources().keys() & graph.modules
    return {name: sorted(graph.find_modules_directly_imported_by(name)) for name in sorted(known)}


@cache
def _version(library: str) -> str:
    """The version of an installed package, without what only names its build (+cpu, +cu128)."""
    try:
        return version(library).partition("+")[0]
    except PackageNotFoundError:
        return "not installed"


def _outside_fingerprint(module: str) -> dict[str, str]:
    own = module.partition(".")[0]
    code: dict[str, str] = {}
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        top, _, rest = name.partition(".")
        if top in PACKAGES:
            code |= code_fingerprint(name) if name in read_sources() else {}
            continue
        path = _locate(name)
        if path is None or (top != own and _is_installed(path)):
            continue
        source = path.read_bytes()
        code[name] = hashlib.sha256(source).hexdigest()
        waiting += [name.rpartition(".")[0]] if rest else []
        if path.suffix == ".py":
            waiting += _imported_names(name, path.name == "__init__.py", source)
    return code


def _locate(module: str) -> Path | None:
    """The file of a module that is not in the project; nothing is imported to find it."""
    spec: ModuleSpec | None = None
    for name in accumulate(module.split("."), "{}.{}".format):
        try:
            folders = spec.submodule_search_locations if spec else None
            spec = PathFinder.find_spec(name, folders) if folders else find_spec(name)
        except (ImportError, ValueError):
            spec = None
        if spec is None or (name != module and not spec.submodule_search_locations):
            return None
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


@cache
def _installed_folders() -> tuple[Path, ...]:
    import sysconfig

    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple(Path(sysconfig.get_path(name)).resolve() for name in names)


def _is_installed(path: Path) -> bool:
    return any(path.resolve().is_relative_to(folder) for folder in _installed_folders())


def _imported_names(name: str, is_package: bool, source: bytes) -> Iterator[str]:
    """The modules that a source imports, and the names that it takes from them: maybe modules."""
    package = name if is_package else name.rpartition(".")[0]
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            with suppress(ImportError):
                base = resolve_name("." * node.level + (node.module or ""), package)
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)
