"""Python functions named in the params: how they are written, found, and refused."""

import sys
from types import ModuleType

import pytest

from plumbline.errors import ParamsError
from plumbline.functions import load_function, split_name


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("toy_scorers")
    module.longer = lambda prompt, response: float(len(response))  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_scorers", module)
    return module


@pytest.mark.parametrize("name", ["toy_scorers:longer", "toy_scorers.longer"])
def test_a_function_is_found_by_either_spelling(toy: ModuleType, name: str) -> None:
    assert load_function(name, "rl.rewards") is toy.longer


@pytest.mark.parametrize("name", ["plumbline.evaluation.principles:gold_score"])
def test_a_function_in_a_package_is_found(name: str) -> None:
    assert load_function(name, "evaluate.gold").__name__ == "gold_score"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a:b", ("a", "b")),
        ("a.b", ("a", "b")),
        ("a.b:c", ("a.b", "c")),
        ("a.b.c", ("a.b", "c")),
        ("b", ("", "b")),
    ],
)
def test_names_are_split_at_the_function(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize(
    "name", ["no_such_module_here:f", "toy_scorers:shorter", "json.no_such:f", "longer"]
)
def test_what_is_not_there_is_an_error_that_names_param_and_function(
    toy: ModuleType, name: str
) -> None:
    with pytest.raises(ParamsError, match=r"^rl\.rewards: .*module:function") as caught:
        load_function(name, "rl.rewards")
    assert repr(name) in str(caught.value)


def test_what_is_no_function_is_refused(toy: ModuleType) -> None:
    with pytest.raises(ParamsError, match=r"^evaluate\.gold: .*'toy_scorers:number' is a int"):
        load_function("toy_scorers:number", "evaluate.gold")
