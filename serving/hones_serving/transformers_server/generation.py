"""In the generation thread: each request is steered as it was admitted.

Transformers' server generates in one thread of its own, one request after the other. A new thread knows nothing of
who submits to it, so the admission is taken from the submitting request's context and carried along.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.cli.serving.utils import GenerateManager, GenerationState

from hones_serving.metrics import Metrics
from hones_serving.registry import Admission
from hones_serving.unsteered import generating
from hones_steer.errors import StateError
from hones_steer.huggingface import Steering
from hones_steer.profile import Profile

# Of the request that is being handled; None: it is not steered, or its route cannot be.
ADMISSION: ContextVar[Admission | None] = ContextVar("hones_admission", default=None)


class OneGeneration(GenerationState):
    """What transformers' handlers ask for a generation thread: there is one, whatever the model is called."""

    def __init__(self, steering: Steering, metrics: Metrics) -> None:
        super().__init__()
        self._manager = SteeredGeneration(steering, metrics)

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:  # noqa: ARG002
        """The thread."""
        return self._manager


class SteeredGeneration(GenerateManager):
    """Transformers' generation thread; what is submitted runs under the admission of who submits."""

    def __init__(self, steering: Steering, metrics: Metrics) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steering = steering
        self._metrics = metrics

    def generate_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Raises StateError if `model` is not the one that is steered."""
        return super().generate_streaming(self._steered(model), *args, **kwargs)

    async def generate_non_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', and generation ends when this is cancelled.

        Raises:
            StateError: `model` is not the one that is steered.
        """
        steered = self._steered(model)
        answer = asyncio.ensure_future(super().generate_non_streaming(steered, *args, **kwargs))
        try:
            return await asyncio.shield(answer)  # the thread sets its result, which it could not in what is cancelled
        except asyncio.CancelledError:
            steered.abandoned.set()
            raise

    def _steered(self, model: Any) -> Any:
        if not self._steering.is_attached_to(model):
            raise StateError("the model was loaded anew, without its steering; restart the server")
        generating()
        return SteeredModel(model, self._steering, ADMISSION.get(), self._metrics)


class SteeredModel:
    """A model whose `generate` is steered by one request's admission; otherwise the model itself."""

    def __init__(self, model: Any, steering: Steering, admission: Admission | None, metrics: Metrics) -> None:
        self._model = model
        self._steering = steering
        self._profile = admission.profile if admission else None
        self._label = admission.label if admission else "none"
        self._metrics = metrics
        self.abandoned = threading.Event()  # nobody waits for the answer any more

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *, input_ids: Tensor, streamer: Any = None, **inputs: Any) -> Tensor:
        """The model's `generate`, counting the tokens that it makes: `[1, prompt + new]`, of prompts `[1, prompt]`."""
        with self._steering_by(self._profile):
            try:
                sequences: Tensor = self._model.generate(
                    input_ids=input_ids, streamer=streamer, stopping_criteria=[self._is_abandoned], **inputs
                )
            finally:  # a stream that nobody reads any more ends with an exception
                if streamer is not None:
                    self._metrics.tokens(self._label, streamer.total_tokens)
        if streamer is None:
            self._metrics.tokens(self._label, sequences.shape[1] - input_ids.shape[1])
        return sequences

    def _is_abandoned(self, ids: Tensor, _scores: object, **_: Any) -> Tensor:
        return torch.full(ids.shape[:1], self.abandoned.is_set(), device=ids.device)

    @contextmanager
    def _steering_by(self, profile: Profile | None) -> Iterator[None]:
        """Steer with contents, not with whatever has the task's name by now."""
        if profile is None:
            yield
            return
        name = profile.digest
        self._steering.load(name, profile)
        try:
            with self._steering.task(name):
                yield
        finally:
            self._steering.unload(name)
