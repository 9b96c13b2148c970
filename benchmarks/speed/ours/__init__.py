"""The work as Plumbline does it, through the library's public functions."""

from importlib import import_module
from importlib.util import find_spec

from benchmarks.speed.ours.without_pydantic import standing_in

# A machine with a GPU may have nothing but the repository and what was installed there.
if find_spec("pydantic") is None:
    with standing_in():
        for module in ("plumbline.params.schema", "plumbline.refs", "plumbline.artifacts"):
            import_module(module)
