"""Talking to a model that `plumbline serve` serves; imports no framework."""

import json
import time
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from plumbline.errors import MachineError, ParamsError

SECONDS = 300.0
"""How long an answer may take."""
SECONDS_TO_LISTEN = 10.0
"""How long a server that was just started may take until it listens."""
SECONDS_TO_LOAD = 120.0
"""How long a server that listens may take until its model is loaded."""
PATIENCE = 2.0
"""How long to wait before saying for what."""


def open_remote_chat(
    url: str, say: Callable[[str], None], *, temperature: float, max_tokens: int, seed: int
) -> Callable[[str], str]:
    """Find a server; returns a function from a request to an answer.

    Args:
        url: of the server, for example http://127.0.0.1:5001.
        say: takes a line that tells what is waited for.
        temperature: divides the logits.
        max_tokens: the longest answer.
        seed: of the first answer; each further one has the next.

    Raises:
        ParamsError: it is no URL of HTTP.
        MachineError: nothing answers there.
    """
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ParamsError(f"--url {url}: expected the address of a server, http://HOST:PORT")
    _wait_for_model(url, say)
    asked = 0

    def answer(request: str) -> str:
        nonlocal asked
        body = {
            "messages": [{"role": "user", "content": request}],
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": (seed + asked) % 2**63,
        }
        asked += 1
        try:
            said = _post(f"{url}/invocations", body)
        except _Refused as refusal:
            return f"({refusal})"
        try:
            return str(said["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise MachineError(
                f"{url}: expected a chat completion, got {json.dumps(said)[:200]}. Is another "
                "server there than that of `plumbline serve`?"
            ) from None

    return answer


class _Refused(Exception):
    """The server does not take this request: the next one may do."""


def _message(said: str) -> str:
    """What MLflow's server says of a request that it refuses."""
    try:
        return str(json.loads(said)["message"])
    except (ValueError, KeyError, TypeError):
        return said


def _wait_for_model(url: str, say: Callable[[str], None]) -> None:
    """Wait until a server answers: it may have been started just now, and load its model."""
    began, said = time.monotonic(), False
    while True:
        try:
            _ping(url, PATIENCE)
            return
        except TimeoutError:
            # It listens before it loads; whoever asks meanwhile waits in line.
            say(f"the server at {url} listens; its model is still loading …")
            break
        except ConnectionRefusedError:
            if time.monotonic() - began > SECONDS_TO_LISTEN:
                raise _no_model(url, "nobody listens") from None
            if not said and time.monotonic() - began > PATIENCE:
                say(f"nobody listens at {url} yet …")
                said = True
            time.sleep(0.2)
        except (OSError, HTTPException) as error:
            raise _no_model(url, error) from None
    try:
        _ping(url, SECONDS_TO_LOAD)
    except (OSError, HTTPException) as error:
        why = f"{error} after {time.monotonic() - began:.0f} s" if str(error) else "it hung up"
        raise _no_model(url, why) from None


def _ping(url: str, seconds: float) -> None:
    """Ask whether a model is there; raises what is below the error of urllib."""
    try:
        # A proxy of the environment is for other machines.
        build_opener(ProxyHandler({})).open(f"{url}/ping", timeout=seconds).close()
    except HTTPError:
        raise
    except URLError as error:
        raise (error.reason if isinstance(error.reason, OSError) else error) from None


def _no_model(url: str, why: object) -> MachineError:
    return MachineError(
        f"No model answers at {url} ({why}): expected a server there. Start one with `plumbline "
        "serve`, or leave --url out to load a model here."
    )


def _post(url: str, body: Any) -> Any:
    request = Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        # A proxy of the environment is for other machines.
        with build_opener(ProxyHandler({})).open(request, timeout=SECONDS) as answer:
            return json.loads(answer.read())
    except HTTPError as error:
        said = error.read(2000).decode(errors="replace")
        if error.code == 400:
            raise _Refused(_message(said)) from None
        raise MachineError(f"{url}: expected an answer, got status {error.code}: {said}") from None
    except (URLError, HTTPException, OSError, ValueError) as error:
        raise MachineError(
            f"{url}: expected an answer, got {error}. Is the server still there?"
        ) from None
