"""MLflow's scoring server for a registered model, which answers conversations."""

import logging
import threading
import time
import uuid
from typing import Any, Literal

from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel, scoring_server
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from plumbline.errors import DataError
from tasks.registry import Version
from tasks.talker import Talker

EXPECTED = (
    'Expected {"messages": [{"role": "user", "content": "…"}]} with, if wanted, temperature, '
    'max_tokens and seed, or {"inputs": ["…"]}, each text a user\'s message.'
)


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(BaseModel):
    """A conversation to answer; of OpenAI's fields those that act here, no others."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    """Clients made for OpenAI's server always send one; it has to be the one that is served."""
    messages: list[Message] = Field(min_length=1)
    temperature: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)


class ChatModel:
    """What MLflow's server asks for predictions."""

    def __init__(
        self, talker: Talker, called: str, *, temperature: float, max_tokens: int, seed: int
    ) -> None:
        """Serve a model.

        Args:
            talker: the model in memory.
            called: its name in answers.
            temperature: of requests that name none.
            max_tokens: of requests that name none.
            seed: of what is drawn for requests that name none.
        """
        self.talker = talker
        self.called = called
        self.temperature = temperature
        self.max_tokens = max_tokens
        self._generator = talker.generator(seed)
        # The server asks from many threads; two at a time would wait for the same cores.
        self._alone = threading.Lock()

    def predict(self, model_input: Any) -> Any:
        """Answer a chat request with a chat completion, or texts with texts.

        Raises:
            MlflowException: the request is not as expected (the server answers 400).
        """
        try:
            if isinstance(model_input, dict) and "messages" in model_input:
                return self._chat(ChatRequest.model_validate(model_input))
            return [
                self._chat(ChatRequest(messages=[Message(role="user", content=text)]))["choices"][
                    0
                ]["message"]["content"]
                for text in _texts(model_input)
            ]
        except ValidationError as error:
            raise MlflowException.invalid_parameter_value(f"{_said(error)}. {EXPECTED}") from None
        except DataError as error:
            raise MlflowException.invalid_parameter_value(f"{error} {EXPECTED}") from None

    def _chat(self, request: ChatRequest) -> dict[str, Any]:
        if request.model not in (None, self.called):
            raise DataError(
                f"model: expected {self.called}, which is served, got {request.model}; leave it "
                "out, or serve that one."
            )
        with self._alone:
            reply = self.talker.reply(
                [message.model_dump() for message in request.messages],
                temperature=request.temperature or self.temperature,
                max_tokens=request.max_tokens or self.max_tokens,
                generator=self._generator
                if request.seed is None
                else self.talker.generator(request.seed),
            )
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.called,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": reply.text},
                    "finish_reason": "stop" if reply.ended else "length",
                }
            ],
            "usage": {
                "prompt_tokens": reply.prompt_tokens,
                "completion_tokens": reply.tokens,
                "total_tokens": reply.prompt_tokens + reply.tokens,
            },
        }


def _said(error: ValidationError) -> str:
    """Which fields are wrong, and why."""
    return "; ".join(
        f"{'.'.join(map(str, one['loc']))}: {one['msg']}"
        for one in error.errors(include_url=False, include_context=False, include_input=False)
    )


def _texts(model_input: Any) -> list[str]:
    """The texts of a request in one of MLflow's own formats, a row or an item each."""
    if hasattr(model_input, "columns"):
        model_input = model_input.iloc[:, 0].tolist() if len(model_input.columns) == 1 else None
    elif hasattr(model_input, "tolist"):
        model_input = model_input.tolist()
    if isinstance(model_input, str):
        model_input = [model_input]
    if not isinstance(model_input, list) or not all(isinstance(one, str) for one in model_input):
        raise DataError("There are neither messages nor texts in the request.")
    return model_input


def scoring_app(version: Version, *, temperature: float, max_tokens: int, seed: int) -> Any:
    """MLflow's scoring server (an ASGI application) on a version, loaded and ready.

    The arguments are those of `ChatModel`.
    """
    # It warns of every request that it refuses, with a stack.
    logging.getLogger("mlflow.pyfunc.scoring_server").setLevel(logging.ERROR)
    model = ChatModel(
        Talker(version.called),
        version.called,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
    )
    about = Model(run_id=version.model.mlflow_run_id, model_id=version.model.mlflow_model_id)
    return scoring_server.init(PyFuncModel(model_meta=about, model_impl=model))
