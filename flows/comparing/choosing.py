"""Which finished runs a user means: by id, by the beginning of an id, by name, or the newest."""

from collections.abc import Sequence
from difflib import get_close_matches

from plumbline.errors import ParamsError
from tasks import past_runs
from tasks.past_runs import PastRun

MOST_RUNS = 8
"""More columns can't be read, nor more colours told apart."""
NEWEST = 5
"""Runs that are compared where none is named."""
LISTED_RUNS = 5


def choose_runs(asked: Sequence[str]) -> list[PastRun]:
    """The finished pipeline runs that are meant, with their steps, in the order asked for.

    Args:
        asked: each an id, a name (its newest finished run), or the unique beginning of an id; the
            newest finished runs, newest first, where it is empty.

    Raises:
        ParamsError: a text means no run, several, or one that is not a finished pipeline's; two
            mean the same run; there are too many.
    """
    if len(asked) > MOST_RUNS:
        raise ParamsError(
            f"compare: expected at most {MOST_RUNS} runs, got {len(asked)}. Name fewer."
        )
    if not asked:
        newest = past_runs.last_pipelines(NEWEST)
        if not newest:
            raise ParamsError(f"no run to compare{what_there_is('')}")
        return [_with_steps(run.run_id) for run in newest]
    chosen: dict[str, str] = {}
    for text in asked:
        run = _find(text)
        if run.run_id in chosen:
            raise ParamsError(
                f"{chosen[run.run_id]} and {text} are the same run, {run.name} ({run.run_id}): "
                "name each run once."
            )
        chosen[run.run_id] = text
    return [_with_steps(run_id) for run_id in chosen]


def _find(text: str) -> PastRun:
    if run := past_runs.find_run(text):
        return _checked(run)
    if named := past_runs.pipelines_named(text):
        return _checked(next((run for run in named if run.status == "FINISHED"), named[0]))
    beginning = past_runs.pipelines_beginning(text)
    if not beginning:
        raise ParamsError(f"no run {text} in MLflow{what_there_is(text)}")
    if len(beginning) > 1:
        said = f"{text} begins the ids of {len(beginning)} runs; add characters:"
        raise ParamsError("\n".join([said, *_lines(beginning)]))
    return _checked(beginning[0])


def _checked(run: PastRun) -> PastRun:
    if run.tags.get("plumbline.kind") != "pipeline":
        parent = run.tags.get("mlflow.parentRunId")
        below = f"it is a step of {parent}; name that" if parent else "it is another kind"
        raise ParamsError(f"{run.run_id} ({run.name}): expected the run of a pipeline; {below}")
    if run.status != "FINISHED":
        raise ParamsError(
            f"{run.run_id} ({run.name}) is {run.status}: expected a finished run{what_there_is('')}"
        )
    return run


def what_there_is(text: str) -> str:
    """The end of a message: the run that may be meant, and the last ones."""
    last = past_runs.last_pipelines(1000)
    if not last:
        return "; no run of a pipeline has finished yet: start with `plumbline run quickstart`"
    known = [name for run in last for name in (run.name, run.run_id)]
    near = get_close_matches(text, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return "\n".join([f"{hint} The last finished runs:", *_lines(last)])


def _lines(runs: Sequence[PastRun]) -> list[str]:
    return [f"  {run.run_id}  {run.name}  {run.status}" for run in runs[:LISTED_RUNS]]


def _with_steps(run_id: str) -> PastRun:
    run = past_runs.find_run(run_id)
    if run is None:
        raise ParamsError(f"run {run_id} was deleted from MLflow meanwhile; try again.")
    return run
