"""A promotion: challenger meets champion, the rule decides, a person may, the alias moves."""

import getpass
import time
from datetime import UTC, datetime
from functools import partial
from typing import Any

from prefect import flow, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.context import TagsContext
from prefect.states import Completed
from rich.console import Console

from flows.alignment.gpu import gpu_slot
from flows.alignment.reports import read_samples
from flows.promotion.approval import NOBODY, Ask, terminal
from flows.promotion.matching import Match, Settled, find_match
from flows.promotion.summary import Promotion, Sample, WinRate, markdown, nothing_to_do
from flows.stopping import cancellable
from plumbline.evaluation.contest import passes
from plumbline.evaluation.scores import Interval
from plumbline.project import Project, find_project, make_home
from plumbline.refs import EvaluationRef
from plumbline.training.memory import release_memory
from tasks import tracking
from tasks.aliases import move_alias, note_version
from tasks.bookkeeping import close_dead_runs
from tasks.contest import contest
from tasks.data_version import git_state
from tasks.keys import cache_key, digest_cache, ingredients
from tasks.locks import step_lock
from tasks.progress import quiet_libraries
from tasks.records import damage, read_result
from tasks.registry import CHAMPION, find_version, tag_version

STATE_NAMES = {"promoted": "Promoted", "refused": "Refused", "nothing to do": "Nothing to do"}


@flow(name="promote", flow_run_name="{model}", persist_result=False)
def promote(model: str, threshold: float, ask: bool) -> Any:
    """Let a registered version meet the champion, and take its place if it is better.

    Args:
        model: The challenger: NAME@ALIAS or NAME/NUMBER.
        threshold: The lower end of its win rate's interval has to be above it.
        ask: Ask on the terminal before the alias moves.
    """
    return conduct(model, threshold, terminal(Console(stderr=True)) if ask else None)


def conduct(model: str, threshold: float, ask: Ask | None) -> State[Promotion]:
    """Do all of a promotion, inside a flow; returns the state in which the flow run is to end.

    Args:
        model: the challenger: NAME@ALIAS or NAME/NUMBER, or an alias or number of
            `plumbline-policy`.
        threshold: the lower end of its win rate's interval has to be above it.
        ask: asks for a person's word where the numbers allow the promotion.

    Raises:
        ParamsError: there is no such version.
        PlumblineError: what is needed of the challenger's run is gone.
    """
    quiet_libraries()
    project = find_project()
    make_home(project.home)
    match = find_match(project, model)
    if isinstance(match, Settled):
        return as_state(nothing_to_do(match))
    close_dead_runs(project.home)
    name = f"promote-{match.challenger.number}-{time.strftime('%Y%m%d-%H%M%S')}"
    params, tags = _params(match, threshold), _tags(project, match)
    with tracking.promotion_run(name, project.home, params, tags) as tracked:
        with cancellable(str(runtime.flow_run.id)):
            found = judge(match, threshold, _meet(project, match, tracked, name))
            found = found.model_copy(
                update={
                    "mlflow_run_id": tracked.run_id,
                    "prefect_flow_run_id": str(runtime.flow_run.id),
                }
            )
            if found.outcome == "promoted" and ask is not None:
                found = _asked(found, ask)
        found = _settle(project, match, found)
        _record(tracked, match, found)
    return as_state(found)


def as_state(found: Promotion) -> State[Promotion]:
    """The state of the flow run: a refusal is an answer, not a failure."""
    return Completed(name=STATE_NAMES[found.outcome], message=found.reason, data=found)


def judge(match: Match, threshold: float, met: EvaluationRef | None) -> Promotion:
    """What the numbers say.

    Args:
        match: who meets whom.
        threshold: the lower end of the win rate's interval has to be above it.
        met: what came of the contest; None where there was none, and the challenger's own run has
            recorded its win rate over the SFT model.
    """
    if match.unfair is not None:
        return _promotion(match, threshold, "refused", match.unfair)
    wins = match.recorded
    if met is not None:
        read = Interval.read(met.metrics, "contest/win_rate")
        assert read is not None
        wins = read
    better = passes(wins, threshold)
    says = "is above" if better else "is not above"
    count = met.metrics["contest/prompts"] if met else match.run.metrics.get("eval/prompts", 0)
    win_rate = WinRate(**wins._asdict())
    reason = (
        f"Version {match.challenger.number} has a win rate of {win_rate} over {match.opponent} on "
        f"{count:.0f} held-out prompts, by the {match.evaluation.scorer}. Its lower end {says} the "
        f"threshold {threshold:g}."
    )
    found = _promotion(match, threshold, "promoted" if better else "refused", reason)
    return found.model_copy(
        update={
            "win_rate": win_rate,
            "prompts": int(count),
            "metrics": met.metrics if met else {},
            "samples": [Sample.model_validate(row) for row in read_samples(met)] if met else [],
        }
    )


def _promotion(match: Match, threshold: float, outcome: Any, reason: str) -> Promotion:
    return Promotion(
        outcome=outcome,
        reason=reason,
        model=match.challenger.name,
        challenger=match.challenger.number,
        champion=match.champion.number if match.champion else None,
        scorer=match.evaluation.scorer,
        threshold=threshold,
        by=getpass.getuser(),
        at=_now(),
        notes=match.notes,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _meet(
    project: Project, match: Match, tracked: tracking.StepRun, name: str
) -> EvaluationRef | None:
    """Let the two answer and be scored, or take what came of it before."""
    if match.champion is None or match.unfair is not None:
        return None
    asked = match.evaluation
    arguments = {
        "params": asked.params,
        "sampling": asked.sampling,
        "precision": asked.precision,
        "seed": asked.seed,
        "champion": match.champion.model,
        "challenger": match.challenger.model,
        "scorer": asked.scoring_model,
        "prompts": asked.prompts,
    }
    key = cache_key("contest", ingredients("contest", arguments))
    run = tracking.PipelineRun(
        mlflow_run_id=tracked.run_id, experiment_id=tracked.experiment_id, name=name, key=key
    )
    with step_lock(project.home, key):
        earlier = read_result(project.results, "contest", key)
        fresh = earlier is None or damage(earlier, digest_cache(project)) is not None
        # The flow run's tags on a task would be names of limits, each asked of the server.
        with TagsContext(current_tags=set()), gpu_slot("evaluate", fresh):
            task = contest.with_options(refresh_cache=fresh)
            state = task(**arguments, run=run, return_state=True)
        met = state.result()
        if state.name == "Cached":
            tracking.stub_run(run, "contest", key, met)
        else:
            release_memory()
            tracking.tag_run(met.mlflow_run_id, {"plumbline.digest": met.digest})
    assert isinstance(met, EvaluationRef)
    return met


def _asked(found: Promotion, ask: Ask) -> Promotion:
    """What a person makes of it."""
    approval = ask(found)
    found = found.model_copy(update={"approved": approval.granted, "by": approval.by, "at": _now()})
    note = f" ({approval.note})" if approval.note else ""
    if approval.granted:
        reason = f"{found.reason} Approved by {approval.by}{note}."
        return found.model_copy(update={"reason": reason})
    said = approval.note if approval.by == NOBODY else f"{approval.by} declined{note}"
    return found.model_copy(update={"outcome": "refused", "reason": f"{found.reason} But {said}."})


def _settle(project: Project, match: Match, found: Promotion) -> Promotion:
    """Move the alias, unless another version has become the champion meanwhile."""
    if found.outcome != "promoted":
        return found
    with step_lock(project.home, f"promote-{found.model}"):
        now = find_version(f"{found.model}@{CHAMPION}")
        if (now.number if now else None) != found.champion:
            is_now = f"version {now.number} is" if now else "none is"
            reason = f"{found.reason} But meanwhile {is_now} the champion; promote again."
            return found.model_copy(update={"outcome": "refused", "reason": reason})
        named = (found.model, CHAMPION, found.challenger)
        move_alias(project.home, *named[:2], partial(tracking.point_alias, *named))
        note_version(project.home, *named, current=tracking.aliased_version)
    return found


def _record(tracked: tracking.StepRun, match: Match, found: Promotion) -> None:
    """Leave the decision on the version, on the run in MLflow, and on Prefect's page."""
    tags = {
        "promotion.outcome": found.outcome,
        "promotion.reason": found.reason,
        "promotion.against": match.opponent,
        "promotion.win_rate": str(found.win_rate or "none"),
        "promotion.scorer": match.evaluation.scorer,
        "promotion.threshold": f"{found.threshold:g}",
        "promotion.by": str(found.by),
        "promotion.at": str(found.at),
        "promotion.run_id": tracked.run_id,
    }
    tag_version(match.challenger, tags)
    # Without samples: a tag holds 8,000 characters.
    brief = markdown(found.model_copy(update={"samples": []}))
    tracked.tag({**tags, "mlflow.note.content": brief})
    tracked.finals(found.metrics)
    tracked.json("promotion", found.model_dump(mode="json"))
    create_markdown_artifact(markdown(found), key="promotion")


def _params(match: Match, threshold: float) -> dict[str, Any]:
    return {
        "promote.model": match.challenger.name,
        "promote.challenger": match.challenger.number,
        "promote.champion": match.champion.number if match.champion else "none",
        "promote.threshold": threshold,
        "promote.scorer": match.evaluation.scorer,
    }


def _tags(project: Project, match: Match) -> dict[str, str]:
    return {
        "plumbline.challenger.run_id": match.challenger.run_id,
        "plumbline.champion.run_id": match.champion.run_id if match.champion else "",
        "prefect.flow_run_id": str(runtime.flow_run.id),
        **git_state(project.root),
    }
