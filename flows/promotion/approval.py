"""A person's word on a promotion: by the form in Prefect's UI, or on the terminal."""

import getpass
from collections.abc import Callable
from typing import NamedTuple
from uuid import UUID, uuid4

from prefect import pause_flow_run, runtime
from prefect.context import SyncClientContext
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput
from prefect.states import Running
from pydantic import Field
from rich.console import Console

from flows.promotion.summary import Promotion, markdown, show_comparison

SECONDS_BETWEEN_LOOKS = 2
NOBODY = "nobody"
"""Who decided where nobody answered."""


class Approval(NamedTuple):
    """What was said."""

    granted: bool
    by: str
    note: str


Ask = Callable[[Promotion], Approval]
"""Asks for a word on a promotion that the numbers allow."""


class Decision(RunInput):
    """The form on the page of a flow run that waits."""

    promote: bool = Field(
        False,
        title="Promote",
        description="Let the alias champion name the challenger from now on. Off: the champion "
        "stays.",
    )
    by: str = Field(min_length=1, max_length=100, title="Your name", description="Who decides.")
    note: str = Field("", max_length=1000, title="Note", description="Kept with the version.")


def form(hours: float) -> Ask:
    """Ask by a form in Prefect's UI, and wait for so long; nobody's answer is a no."""

    def ask(found: Promotion) -> Approval:
        try:
            answer = pause_flow_run(
                wait_for_input=Decision.with_initial_data(description=markdown(found)),
                timeout=max(1, round(hours * 3600)),
                poll_interval=SECONDS_BETWEEN_LOOKS,
                # A run that is tried again in the UI asks again, and an old answer is not taken.
                key=f"approval-{uuid4().hex[:8]}",
            )
        except FlowPauseTimeout:
            _go_on()
            return Approval(False, NOBODY, f"nobody answered within {_span(hours)}")
        return Approval(answer.promote, answer.by, answer.note)

    return ask


def terminal(console: Console) -> Ask:
    """Ask on the terminal; anything but y is a no."""

    def ask(found: Promotion) -> Approval:
        show_comparison(console, found)
        console.print(found.reason, markup=False, highlight=False, soft_wrap=True)
        try:
            answer = input(f"Promote version {found.challenger}? [y/N] ").strip().lower()
        except EOFError:
            answer = ""
        return Approval(answer in ("y", "yes"), getpass.getuser(), "")

    return ask


def _go_on() -> None:
    """Let this flow run end in a state of its own: by itself, a pause that is over fails it."""
    with SyncClientContext.get_or_create() as context:
        context.client.set_flow_run_state(UUID(runtime.flow_run.id), Running(), force=True)


def _span(hours: float) -> str:
    return f"{hours:g} h" if hours >= 1 else f"{max(1, round(hours * 3600))} s"
