"""The call of a flow by a command, on the server that it has joined.

To be imported once PREFECT_API_URL names the server.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect import tags
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from flows.services.prefect_server import wait_for_server
from flows.stopping import confirm_cancellation
from tasks.bookkeeping import process_tag


@contextmanager
def calling(home: Path, *more_tags: str) -> Iterator[None]:
    """Call a flow inside: its run says which process it is, and why it was stopped.

    Args:
        home: of the project whose server was joined.
        more_tags: of the flow run.

    Raises:
        MachineError: the server does not start.
    """
    wait_for_server(home)
    # Its thread sleeps in whole seconds, and the end of the flow waits for it. Which process a run
    # is says its tag, by which the next run finds that it died.
    no_heartbeats = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    try:
        with temporary_settings(set_defaults=no_heartbeats), tags(process_tag(), *more_tags):
            yield
    finally:
        confirm_cancellation()
