"""The work as Plumbline does it, through the library's public functions."""

from importlib.util import find_spec

from benchmarks.speed.ours import without_pydantic

# A machine with a GPU may have nothing but the repository and what was installed there.
if find_spec("pydantic") is None:
    without_pydantic.install()
