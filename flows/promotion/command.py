"""The command `plumbline promote`: a look at who would meet whom, then the flow."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from plumbline.errors import ParamsError
from plumbline.project import Project

if TYPE_CHECKING:
    from flows.promotion.summary import Promotion


def run_promotion(
    project: Project, console: Console, model: str, threshold: float, *, ask: bool
) -> "Promotion":
    """Let a version meet the champion, or say at once that nothing is to do.

    Args:
        project: the project.
        console: is told that the contest starts.
        model: the challenger: NAME@ALIAS or NAME/NUMBER, or an alias or number of
            `plumbline-policy`.
        threshold: the lower end of its win rate's interval has to be above it.
        ask: ask on the terminal before the alias moves.

    Raises:
        ParamsError: there is no such version, or no terminal to ask on.
        PlumblineError: what is needed of the challenger's run is gone.
    """
    if ask and not sys.stdin.isatty():
        raise ParamsError(
            "--ask: expected a terminal to ask on, got none. Leave it out, or start the deployment "
            "`promote` in Prefect's UI, which asks there."
        )
    from flows.services.prefect_server import join_server
    from tasks.sources import read_sources

    # It starts beside these imports, which take as long.
    join_server(project.home)
    # Before the imports, so that an edit in between is seen.
    read_sources()
    from flows.promotion.matching import Settled, find_match
    from flows.promotion.summary import nothing_to_do

    match = find_match(project, model)
    if isinstance(match, Settled):
        return nothing_to_do(match)
    console.print(
        f"[bold]{match.challenger.called}[/bold] meets {match.opponent}, judged by the "
        f"{match.evaluation.scorer} …"
    )
    from flows.promotion.flow import promote
    from flows.services.calling import calling

    with calling(project.home):
        # Typed as what its function returns, the state; a call gives what the state holds.
        run: Callable[..., Promotion] = cast(Any, promote)
        return run(match.challenger.called, threshold, ask)
