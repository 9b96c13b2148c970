"""A stand-in for pydantic where it is not installed: fields with their defaults, unchecked.

The library reads params through pydantic models. Benchmarks make these themselves, with values that
are known to be good, so that a machine on which nothing can be installed is measured all the same.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class FieldInfo:
    """What `Field(...)` returns."""

    def __init__(self, default: Any = None, default_factory: Any = None, **_: Any) -> None:
        self.default = default
        self.default_factory = default_factory

    def get_default(self, call_default_factory: bool = False) -> Any:
        """The value of a field that nobody set."""
        return self.default_factory() if self.default_factory else self.default


class BaseModel:
    """A model that takes its fields as keywords."""

    def __init__(self, **values: Any) -> None:
        known = {
            name for kind in type(self).__mro__ for name in vars(kind).get("__annotations__", {})
        }
        if unknown := values.keys() - known:
            raise TypeError(f"{type(self).__name__}: expected fields of the model, got {unknown}")
        for name in known:
            value = values.get(name, getattr(type(self), name, None))
            vars(self)[name] = value.get_default() if isinstance(value, FieldInfo) else value


class TypeAdapter:
    """Reads JSON into a type; nothing that is benchmarked does."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __class_getitem__(cls, _: Any) -> type:
        return cls


class ValidationError(ValueError):
    """Never raised here."""


def _decorator(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda function: function


@contextmanager
def standing_in() -> Iterator[None]:
    """Let `import pydantic` find this inside the block alone: others ask for it, too."""
    module = ModuleType("pydantic")
    vars(module).update(
        BaseModel=BaseModel,
        ConfigDict=dict,
        Field=FieldInfo,
        TypeAdapter=TypeAdapter,
        ValidationError=ValidationError,
        field_validator=_decorator,
        model_validator=_decorator,
    )
    sys.modules["pydantic"] = module
    try:
        yield
    finally:
        del sys.modules["pydantic"]
