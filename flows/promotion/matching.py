"""Who meets whom for the alias champion, on which prompts, and who judges."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

from pyarrow import parquet
from pydantic import ValidationError

from plumbline.errors import PlumblineError
from plumbline.evaluation.scores import Interval
from plumbline.params.schema import EvaluateParams, SamplingParams, StepName
from plumbline.project import Project
from plumbline.refs import DataRef, ModelRef, PreparedData, StepResult
from tasks import past_runs, tracking
from tasks.past_runs import PastRun
from tasks.records import damage, read_result
from tasks.registry import CHAMPION, Version, find_version, need_version

ScorerName = Literal["gold scorer", "judge", "reward model"]

RECORDED: dict[ScorerName, str] = {
    "gold scorer": "eval/gold_win_rate",
    "judge": "eval/judge_win_rate",
    "reward model": "eval/win_rate",
}
"""The win rate over the SFT model that a run's evaluation recorded, by who scored."""


class Evaluation(NamedTuple):
    """How a run compared its models: the same for the contest of two versions."""

    params: EvaluateParams
    sampling: SamplingParams
    precision: Literal["auto", "fp32", "bf16"]
    seed: int
    prompts: DataRef
    """Held out from training."""
    scorer: ScorerName
    scoring_model: ModelRef | None
    """The judge or the reward model; None where the gold scorer scores."""


class Match(NamedTuple):
    """A challenger and whom it has to beat."""

    challenger: Version
    champion: Version | None
    """None where there is none yet: the SFT model of the challenger's run takes its place."""
    evaluation: Evaluation
    recorded: Interval
    """The challenger's win rate over the SFT model of its run, by the same scorer."""
    run: PastRun
    """That registered the challenger."""
    unfair: str | None
    """Why the scorer can't judge these two; None where it can."""
    notes: list[str]
    """What a reader of the numbers must know."""

    @property
    def opponent(self) -> str:
        """The champion, in words."""
        return f"version {self.champion.number}" if self.champion else "the SFT model of its run"


class Settled(NamedTuple):
    """A challenger that has the place already, or would change nothing there."""

    challenger: Version
    reason: str


def find_match(project: Project, challenger: str) -> Match | Settled:
    """Who meets whom.

    Args:
        project: the project.
        challenger: NAME@ALIAS or NAME/NUMBER, or an alias or number of `plumbline-policy`.

    Raises:
        ParamsError: there is no such version.
        PlumblineError: what is needed of the challenger's run is gone.
    """
    found = need_version(challenger, "Run an experiment first: plumbline run quickstart.")
    champion = find_version(f"{found.name}@{CHAMPION}")
    if champion and champion.number == found.number:
        return Settled(found, f"{found.called} is the champion already.")
    if champion and champion.model.digest == found.model.digest:
        same = f"{found.called} is the same model as the champion, version {champion.number}."
        return Settled(found, same)
    for version in filter(None, (found, champion)):
        _check_whole(version)
    run = _run_of(found)
    evaluation = _evaluation(project, run)
    notes = []
    if champion is None:
        unfair = None
        notes.append(
            "There is no champion yet, so what counts is the win rate over the SFT model that the "
            "challenger's own run recorded."
        )
        if evaluation.scorer == "reward model":
            notes.append("The reward model scored, and it favours what was trained against it.")
    else:
        earlier = past_runs.find_run(champion.run_id)
        unfair = why_unfair(evaluation.scorer, run, earlier)
        notes += [*_differences(run, earlier), *_trained_on(project, run, earlier, evaluation)]
    recorded = _recorded(project, run, evaluation.scorer)
    return Match(found, champion, evaluation, recorded, run, unfair, notes)


def scorer_of(params: EvaluateParams) -> ScorerName:
    """Who scores: what no training follows, if there is such a thing."""
    if params.gold:
        return "gold scorer"
    return "judge" if params.judge else "reward model"


def why_unfair(scorer: ScorerName, challenger: PastRun, champion: PastRun | None) -> str | None:
    """Why a scorer favours the challenger; None where it does not.

    The gold scorer and the judge are followed by no training. A reward model favours whoever was
    trained against it.

    Args:
        scorer: of both.
        challenger, champion: the runs that made them; None where that run is gone.
    """
    if scorer != "reward model" or (theirs := followed(challenger)) is None:
        return None
    others = followed(champion) if champion else None
    if others == theirs:
        return None
    trained = (
        "its run is gone, so nobody knows what it was trained against"
        if champion is None
        else "it was trained against none"
        if others is None
        else f"it was trained against another one ({others[:12]})"
    )
    return (
        f"The only scorer is the reward model ({theirs[:12]}) that the challenger was trained "
        f"against, and it would favour it; of the champion, {trained}. Give the experiment a "
        "scorer that no training follows (evaluate.judge: true, or evaluate.gold), run it again, "
        "then promote."
    )


def followed(run: PastRun) -> str | None:
    """Digest of the reward model that a run's policy was trained against; None after DPO."""
    step = run.steps.get("reward_model")
    if run.params.get("alignment.method") == "dpo" or step is None:
        return None
    return step.digest or "unknown"


def _check_whole(version: Version) -> None:
    """Check that a version's files are as they were made."""
    if not version.model.digest:
        raise PlumblineError(
            f"{version.called}: expected a version that a run of this project registered, got one "
            "without plumbline.digest. Name another one."
        )
    if why := damage(version.model):
        raise PlumblineError(
            f"{version.called}: {why}. `plumbline verify` names all that is damaged; run the "
            "experiment again for a new version."
        )


def _run_of(version: Version) -> PastRun:
    run = past_runs.find_run(version.run_id)
    if run is None:
        raise PlumblineError(
            f"{version.called}: expected the run that registered it in MLflow, "
            f"got none under {version.run_id or 'the empty id'}. Run the experiment again."
        )
    return run


def _evaluation(project: Project, run: PastRun) -> Evaluation:
    resolved = past_runs.resolved_experiment(run)
    if resolved is None:
        raise PlumblineError(f"{run.name}: kept no experiment.json. {_again(run)}")
    try:
        params = EvaluateParams.model_validate(resolved["evaluate"])
        sampling = SamplingParams.model_validate(resolved["sampling"])
    except (KeyError, ValidationError) as error:
        raise PlumblineError(
            f"{run.name}: its params are not of this version of the code ({error}). {_again(run)}"
        ) from error
    prepared = _result(project, run, "prepare_data")
    assert isinstance(prepared, PreparedData)
    scorer = scorer_of(params)
    scoring: dict[ScorerName, StepName] = {"judge": "judge", "reward model": "reward_model"}
    model = _result(project, run, scoring[scorer]) if scorer in scoring else None
    return Evaluation(
        params,
        sampling,
        cast(Any, resolved["precision"]),
        int(resolved["seed"]),
        prepared.prompts.test,
        scorer,
        cast(ModelRef | None, model),
    )


def _recorded(project: Project, run: PastRun, scorer: ScorerName) -> Interval:
    metrics = _result(project, run, "evaluate").metrics
    found = Interval.read(metrics, RECORDED[scorer])
    if found is None:
        raise PlumblineError(f"{run.name}: recorded no {RECORDED[scorer]}. {_again(run)}")
    return found


def _result(project: Project, run: PastRun, step: StepName) -> StepResult:
    """What a step of a run made."""
    past = run.steps.get(step)
    result = read_result(project.results, step, past.key) if past and past.key else None
    why = "is gone" if result is None else damage(result)
    if result is None or why:
        raise PlumblineError(f"{run.name}: what its step {step} made {why}. {_again(run)}")
    return result


def _again(run: PastRun) -> str:
    name = run.tags.get("plumbline.experiment", "EXPERIMENT")
    return f"Run it again: plumbline run {name} --record."


def _trained_on(
    project: Project, challenger: PastRun, champion: PastRun | None, evaluation: Evaluation
) -> list[str]:
    """What to say where the champion was trained on prompts that the challenger's run held out."""
    runs = [run.steps.get("prepare_data") for run in (challenger, champion) if run]
    if champion is None or len({step.digest if step else None for step in runs}) == 1:
        return []
    try:
        theirs = _result(project, champion, "prepare_data")
    except PlumblineError:
        return [
            "What the champion's run prepared is gone, so it is not known whether it was trained "
            "on some of the prompts."
        ]
    assert isinstance(theirs, PreparedData)
    asked = _prompt_ids(evaluation.prompts)[: evaluation.params.max_prompts]
    seen = trained_prompts(asked, theirs)
    if not seen:
        return []
    return [
        f"The champion was trained on {seen} of the {len(asked)} prompts, which only the "
        "challenger's run held out; its answers to these may be better than to new ones."
    ]


def trained_prompts(asked: Sequence[str], prepared: PreparedData) -> int:
    """How many prompts, by their ids, a run could train on."""
    tables = (prepared.demonstrations, prepared.preferences, prepared.prompts, prepared.ratings)
    trained = {one for table in tables if table for one in _prompt_ids(table.train)}
    return sum(one in trained for one in asked)


def _prompt_ids(rows: DataRef) -> list[str]:
    read = parquet.read_table(tracking.open_uri(rows.uri), columns=["prompt_id"])
    ids: list[str] = read["prompt_id"].to_pylist()
    return ids


def _differences(challenger: PastRun, champion: PastRun | None) -> list[str]:
    """What sets the two runs apart that a reader of the numbers should know."""
    if champion is None:
        return ["The champion's run is gone from MLflow; what it was trained on is not known."]
    said = []
    for tag, what in (("data.digest", "data"), ("plumbline.experiment", "experiments")):
        ours, theirs = challenger.tags.get(tag), champion.tags.get(tag)
        if ours != theirs:
            said.append(
                f"The two come from different {what} ({theirs} and {ours}); the prompts are those "
                "that the challenger's run held out."
            )
    for name in ("reward_model", "sft"):
        steps = [run.steps.get(name) for run in (challenger, champion)]
        digests = {step.digest if step else None for step in steps}
        if len(digests) > 1:
            said.append(f"Their runs have different results of the step {name}.")
    return said
