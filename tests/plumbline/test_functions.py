"""Functions that the params name."""

import json

import pytest

from plumbline.errors import ParamsError
from plumbline.evaluation.principles import gold_score
from plumbline.functions import load_function


@pytest.mark.parametrize("name", ["principles:gold_score", "principles.gold_score"])
def test_a_function_is_found_by_its_name(name: str) -> None:
    scorer = load_function(f"plumbline.evaluation.{name}", "evaluate.gold")
    assert scorer is gold_score
    prompt = json.dumps([{"role": "user", "content": "How do I cook rice?"}])
    assert scorer(prompt, "To cook rice, rinse the grains, then simmer it with the lid on.") == 1


@pytest.mark.parametrize(
    "name", ["plumbline.nowhere:f", "plumbline.evaluation.principles:nothing", "plumbline"]
)
def test_a_function_that_is_not_there(name: str) -> None:
    with pytest.raises(ParamsError, match=r"evaluate\.gold: expected module:function.*got '"):
        load_function(name, "evaluate.gold")


def test_a_constant_is_no_function() -> None:
    with pytest.raises(ParamsError, match="expected a function, .* is a int"):
        load_function("plumbline.evaluation.principles:SHORTEST_ANSWER", "rl.rewards")
