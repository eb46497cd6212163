"""Transformers' request handlers for one model under its served names.

Transformers' server ignores fields of OpenAI's API that it does not implement, drops images that a model cannot see,
and opens image files on its own machine. Here each of these is answered with 400 and a message that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import HTTPException
from jinja2 import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler, GenerationState, Modality

from hones_serving.transformers_server.rows import SEED, checked_seed
from hones_serving.transformers_server.turns import TURN

# Fields that transformers' server ignores: those that do not matter to an answer, ...
_HARMLESS = {"metadata", "parallel_tool_calls", "prediction", "service_tier", "store", "stream_options", "user"}
# ... and values of other fields that ask for nothing.
_NOTHING = {
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "tool_choice": "auto",
    "top_logprobs": 0,
}

_TEXT = {"text", "input_text", "output_text"}
_SEEN = {"image_url", "input_image", "video_url"}
_PARTS = {
    Modality.LLM: _TEXT,
    Modality.VLM: _TEXT | _SEEN,
    Modality.MULTIMODAL: _TEXT | _SEEN | {"input_audio", "audio_url"},
}

# Errors of transformers on a request that it cannot make sense of: fields of wrong types, broken images, ...
_MALFORMED = (TypeError, AttributeError, ValueError, LookupError, OSError, TemplateError)


class _Served(BaseHandler):
    """Base of the three handlers, all of one model, whose names are `served`."""

    def __init__(self, manager: Any, state: GenerationState, served: Sequence[str]) -> None:
        super().__init__(manager, state)
        self._served = served

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer as transformers does, steered as the middleware has admitted the request.

        Raises:
            HTTPException: 404 for another model, 400 or 422 for a request that transformers cannot fulfill or read.
            StateError: the model is not steered.
            StoppingError: the server stops before it has answered.
        """
        if body.get("max_completion_tokens") is not None:  # the newer name; transformers reads the older one
            body["max_tokens"] = body.pop("max_completion_tokens")
        try:
            response = await super().handle_request(body, request_id)  # type: ignore[misc]
        except _MALFORMED as error:
            raise HTTPException(400, f"this request cannot be answered: {type(error).__name__}: {error}") from error
        await TURN.get().begun()  # a stream's status is not sent before: it may still have to be 503
        return response

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        for name in sorted(body.keys() & self._unused_fields - _HARMLESS):
            if body[name] is not None and body[name] != _NOTHING.get(name):
                raise HTTPException(400, f"{name!r} is not supported by the transformers engine; leave it out")

    def _resolve_model(self, body: dict[str, Any]) -> Any:
        """The model's name as the request has it, the model, its processor. Raises HTTPException if it is unknown."""
        requested = self._served[0] if body.get("model") is None else body["model"]
        if requested not in self._served:
            raise HTTPException(404, f"the model {requested!r} does not exist; this server has {self._served[0]!r}")
        body["model"] = self.model_manager.force_model
        _, model, processor = super()._resolve_model(body)
        return requested, model, processor

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if body.get("seed") is not None:
            SEED.set(checked_seed(body["seed"]))
        config = super()._build_generation_config({**body, "seed": None}, *args, **kwargs)
        if body.get("temperature"):
            config.do_sample = True  # transformers' server sets the temperature only, which greedy decoding ignores
        return config

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict[str, Any]], modality: Modality) -> Any:
        """Convert messages as transformers does, but lose no part of one and read no file of the server's machine.

        Raises:
            HTTPException: 400, naming the part.
        """
        for message in messages:
            parts = message.get("content") if isinstance(message, dict) else None
            for part in parts if isinstance(parts, list) else ():
                if part["type"] not in _PARTS[modality]:
                    raise HTTPException(400, f"this model cannot take a part of the type {part['type']!r}")
        converted = BaseHandler.get_processor_inputs_from_messages(messages, modality)
        for message in converted:
            for part in message["content"] if isinstance(message["content"], list) else ():
                if not part.get("url", "data:").startswith(("data:", "https://", "http://")):
                    raise HTTPException(400, f"the {part['type']} has no data:, https:// or http:// URL; give one")
        return converted


class Chat(_Served, ChatCompletionHandler):
    """``POST /v1/chat/completions``."""


class Completion(_Served, CompletionHandler):
    """``POST /v1/completions``."""


class Responses(_Served, ResponseHandler):
    """``POST /v1/responses``."""
