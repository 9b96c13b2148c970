"""`plumbline serve`: a registered model behind MLflow's scoring server, until it is ended."""

import socket
from collections.abc import Callable
from typing import Any

from flows.services.hosts import LOOPBACK, Gate
from flows.services.processes import Address, listen
from flows.stopping import Terminated

HOST = "127.0.0.1"
SECONDS_TO_FINISH = 3
"""How long an answer that is under way may take once the server is to end."""


def serve_model(
    name: str,
    port: int,
    say: Callable[[str], None],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> None:
    """Serve a model on loopback until a signal ends the process.

    Args:
        name: NAME@ALIAS or NAME/NUMBER, or an alias or number of `plumbline-policy`.
        port: where to listen.
        say: takes a line that tells how far it has come.
        temperature: of requests that name none.
        max_tokens: of requests that name none.
        seed: of what is drawn for requests that name none.

    Raises:
        ParamsError: there is no such version.
        PlumblineError: its model is gone.
        MachineError: the port is in use.
    """
    try:
        # Taken before the imports: whoever asks before the model is loaded waits in line.
        with listen(Address(HOST, port), "--port") as listener:
            from tasks.registry import need_version

            version = need_version(name, otherwise(name))
            say(f"loading {version.called} …")
            from tasks.progress import quiet_libraries
            from tasks.scoring import scoring_app

            quiet_libraries()
            app = scoring_app(version, temperature=temperature, max_tokens=max_tokens, seed=seed)
            url = f"http://{HOST}:{port}"
            say(f"{version.called} answers at {url}/invocations; Ctrl-C ends it.")
            say(f"Talk to it: plumbline chat --url {url}")
            _run(app, listener)
    except (KeyboardInterrupt, Terminated):
        # There is no other end, so it is a good one.
        say("ended")


def otherwise(name: str) -> str:
    """What to do where there is no such version."""
    if name.rpartition("@")[2] == "champion":
        return (
            "`plumbline promote` makes the challenger the champion; `plumbline serve challenger` "
            "serves it as it is."
        )
    return "Run an experiment first: plumbline run quickstart."


def _run(app: Any, listener: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(
        Gate(app, LOOPBACK),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SECONDS_TO_FINISH,
    )
    uvicorn.Server(config).run(sockets=[listener])
