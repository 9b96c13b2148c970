"""Tests of flows.alignment.place."""

import pytest

from flows.alignment.place import Place, basis_of
from plumbline.errors import PlumblineError
from plumbline.params.schema import Experiment
from plumbline.refs import DataVersion

EXPERIMENT = Experiment(seed=1)
DATA = DataVersion(digest="a.dir", path="data/tiny", rev="r1", files={"prompts.jsonl": "b"})
PLACE = Place("run", "sweep", 1, "seed=1", basis_of(EXPERIMENT, DATA))


def test_a_point_runs_on_what_its_sweep_began_with() -> None:
    PLACE.check(EXPERIMENT, DATA)
    # Another data set beside it is none of its business.
    PLACE.check(EXPERIMENT, DATA.model_copy(update={"rev": "r2"}))


@pytest.mark.parametrize(
    ("experiment", "data"),
    [(Experiment(seed=2), DATA), (EXPERIMENT, DATA.model_copy(update={"digest": "c.dir"}))],
)
def test_a_point_whose_params_or_data_were_changed_is_refused(
    experiment: Experiment, data: DataVersion
) -> None:
    with pytest.raises(PlumblineError, match="was changed after the sweep began"):
        PLACE.check(experiment, data)
