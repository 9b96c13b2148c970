"""What is checked of an experiment before anything is trained."""

import json
from pathlib import Path

import pytest

from plumbline.checks import check_experiment
from plumbline.errors import ParamsError
from plumbline.params.schema import EvaluateParams, Experiment, LocalModel, RLParams

GOLD = "plumbline.evaluation.principles:gold_score"


def test_a_sound_experiment_passes(tmp_path: Path) -> None:
    sound = Experiment(rl=RLParams(rewards={GOLD: 0.5}), evaluate=EvaluateParams(gold=GOLD))
    check_experiment(sound, tmp_path)


def test_a_reward_function_that_is_missing_is_named(tmp_path: Path) -> None:
    broken = Experiment(rl=RLParams(rewards={GOLD: 0.5, "plumbline.errors:nope": 1.0}))
    with pytest.raises(ParamsError, match=r"^rl\.rewards: .*'plumbline\.errors:nope'"):
        check_experiment(broken, tmp_path)


def test_a_gold_scorer_that_is_missing_is_named(tmp_path: Path) -> None:
    broken = Experiment(evaluate=EvaluateParams(gold="no_such_module_here.gold"))
    with pytest.raises(ParamsError, match=r"^evaluate\.gold: .*no_such_module_here"):
        check_experiment(broken, tmp_path)


def test_a_model_that_is_missing_is_named(tmp_path: Path) -> None:
    broken = Experiment(model=LocalModel(source="local", path="nowhere"))
    with pytest.raises(ParamsError, match=r"^model\.path: .*nowhere"):
        check_experiment(broken, tmp_path)


@pytest.mark.parametrize(("context", "fits"), [(128, True), (127, False)])
def test_prompt_and_response_must_fit_the_pretrained_models_context(
    tmp_path: Path, context: int, fits: bool
) -> None:
    # The defaults: 64 tokens of prompt and 64 of response.
    (tmp_path / "model").mkdir()
    config = json.dumps({"max_position_embeddings": context})
    (tmp_path / "model" / "config.json").write_text(config)
    asked = Experiment(model=LocalModel(source="local", path="model"))
    if fits:
        check_experiment(asked, tmp_path)
    else:
        with pytest.raises(ParamsError, match=r"<= 127, got 64 \+ 64 = 128"):
            check_experiment(asked, tmp_path)
