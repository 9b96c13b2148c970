"""The command `plumbline data watch`: one look, and an event where a Prefect server is up."""

import os
from typing import TYPE_CHECKING

from rich.console import Console

from flows.services.processes import PREFECT
from flows.services.status import named_servers, running_url
from flows.watching.found import WORK_TREE, Found
from flows.watching.report import show
from plumbline.errors import ParamsError
from plumbline.params.loader import load_experiment
from plumbline.project import Project

if TYPE_CHECKING:
    from flows.watching.look import Announce


def watch_by_hand(
    project: Project, console: Console, experiment: str, ref: str, *, again: bool
) -> Found:
    """Look at the data once, print what there is to say, and announce a change.

    Raises:
        InvalidData: rows of the changed data break rules.
        DataError: the data can't be had, or the git remote can't be reached.
        ParamsError: there is no such experiment or ref.
        MachineError: the Prefect server does not answer.
    """
    name = load_experiment(experiment, project.params).name
    announce, why_not = _announcer(project, name)
    # Only now: it imports Prefect, which looks for the server's address once.
    from flows.watching.look import watch

    found = watch(project, experiment, ref, again=again, announce=announce)
    show(console, found)
    if found.state == "changed":
        console.print(f"\nNothing was started. {why_not} {_advice(found)}", soft_wrap=True)
    if found.state == "announced":
        console.print(f"\nPrefect has the event {found.event}, and its automation starts the run.")
    return found


def _announcer(project: Project, experiment: str) -> "tuple[Announce | None, str]":
    """What announces a change to the server that is up; or None, and why nothing does."""
    api = named_servers(project).get(PREFECT)
    url = running_url(project, PREFECT)
    if api is None and url is None:
        return None, "No Prefect server is up."
    os.environ["PREFECT_API_URL"] = api or f"{url}/api"
    from flows.services.deploying import check_reachable
    from flows.watching.announcing import announce, find_target

    check_reachable(os.environ["PREFECT_API_URL"])
    try:
        target = find_target(experiment)
    except ParamsError as error:
        return None, str(error)
    return lambda found: announce(found, target), ""


def _advice(found: Found) -> str:
    after_up = "`plumbline up`, then this command again, starts a run"
    if found.source != WORK_TREE:
        return f"{after_up} on that version of the data; or merge {found.source} and run."
    return f"`plumbline run {found.experiment}` runs it; so does {after_up}."
