"""Talking to a model that `plumbline serve` serves; imports no framework."""

import json
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from flows.services.processes import answers
from plumbline.errors import MachineError, ParamsError

SECONDS = 300.0
"""How long an answer may take."""


def open_remote_chat(
    url: str, *, temperature: float, max_tokens: int, seed: int
) -> Callable[[str], str]:
    """Find a server; returns a function from a request to an answer.

    Args:
        url: of the server, for example http://127.0.0.1:5001.
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
    if not answers(f"{url}/ping"):
        raise MachineError(
            f"No model answers at {url}: expected a server there. Start one with `plumbline "
            "serve`, or leave --url out to load a model here."
        )
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
        said = _post(f"{url}/invocations", body)
        try:
            return str(said["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise MachineError(
                f"{url}: expected a chat completion, got {json.dumps(said)[:200]}. Is another "
                "server there than that of `plumbline serve`?"
            ) from None

    return answer


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
        raise MachineError(f"{url}: expected an answer, got status {error.code}: {said}") from None
    except (URLError, HTTPException, OSError, ValueError) as error:
        raise MachineError(
            f"{url}: expected an answer, got {error}. Is the server still there?"
        ) from None
