"""A process that has imported the libraries, from which the tests fork their commands.

    python tests/warm.py SOCKET HOME        is how conftest.py starts it

What a command imports of them costs more time than all else that most tests do. It goes through the
same `main` as always, in a process of its own, in which Prefect and the project's own flows and
tasks are imported anew: these look at the environment when they are imported.
"""

import gc
import json
import os
import pkgutil
import select
import signal
import socket
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

Order = dict[str, Any]
"""A command: its `arguments`, `cwd` and `env`."""

LIBRARIES = (
    "mlflow.pyfunc",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.transformers",
    "peft",
    # Of Prefect.
    "cloudpickle",
    "coolname",
    "fastapi",
    "griffe",
    "httpx",
    "jsonschema",
    "opentelemetry.sdk.trace",
    "pendulum",
    "pydantic_settings",
    "rich.traceback",
    "sqlalchemy.ext.asyncio",
    "typer",
    "websockets.asyncio.client",
    # Of the models of the small project.
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
)


def main(channel: int, home: Path) -> None:
    """Import the libraries, then fork a process for each order, and be it there."""
    # As it is for `plumbline`: not the folder of this file.
    sys.path[0] = str(Path(sys.executable).parent)
    preload(home)
    order = serve(socket.socket(fileno=channel))
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    from flows import cli

    sys.argv = [str(Path(sys.executable).with_name("plumbline")), *order["arguments"]]
    cli.main()


def preload(home: Path) -> None:
    """Import what commands import, in an environment such as theirs."""
    from flows.environment import prepare_environment
    from plumbline.project import Project

    prepare_environment(Project(home, home))
    import plumbline

    names = [found.name for found in pkgutil.walk_packages(plumbline.__path__, "plumbline.")]
    for name in (*names, *LIBRARIES):
        with suppress(ModuleNotFoundError):
            import_module(name)
    assert "prefect" not in sys.modules
    gc.collect()
    gc.freeze()


def serve(orders: socket.socket) -> Order:
    """Fork a process for each order; returns in these, and ends with the one that orders.

    With an order come three descriptors: of its output, of its errors, and one to which its exit
    code is written. The answer is the number of its process.
    """
    # A Ctrl-C is for the tests.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([orders, reading], [], [])
        if reading in ready:
            os.read(reading, 4096)
            report_ended(running)
        if orders in ready:
            message, descriptors, _, _ = socket.recv_fds(orders, 1 << 20, 3)
            if not message:
                os._exit(0)
            output, errors, status = descriptors
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for target, source in enumerate((os.open(os.devnull, os.O_RDONLY), output, errors)):
                    os.dup2(source, target)
                    os.close(source)
                orders.close()
                for descriptor in (reading, writing, status, *running.values()):
                    os.close(descriptor)
                order: Order = json.loads(message)
                return order
            running[pid] = status
            os.close(output)
            os.close(errors)
            orders.send(str(pid).encode())


def report_ended(running: dict[int, int]) -> None:
    """Write the exit code of each process that ended, and forget it."""
    for pid, descriptor in [*running.items()]:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            del running[pid]
            with suppress(BrokenPipeError):
                os.write(descriptor, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(descriptor)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
