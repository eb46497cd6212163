"""The generation thread, in which each request is steered as it was admitted.

Transformers' server generates in one thread of its own, one request after the other. That thread does not have the
context of the request that submits to it, so the admission is taken from there and carried along.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.cli.serving.utils import GenerateManager, GenerationState, _StreamError

from hones_serving.exchange import generating
from hones_serving.metrics import Metrics
from hones_serving.registry import Admission
from hones_serving.transformers_server.turns import TURN, StoppingError, Turn
from hones_steer.errors import StateError
from hones_steer.huggingface import Steering
from hones_steer.profile import Profile

# The admission of the request that is being handled; None: it is not steered, or its route cannot be.
ADMISSION: ContextVar[Admission | None] = ContextVar("hones_admission", default=None)


class OneGeneration(GenerationState):
    """Transformers' table of generation threads, with the one thread there is, whatever the model is called."""

    def __init__(self, steering: Steering, metrics: Metrics) -> None:
        super().__init__()
        self._manager = SteeredGeneration(steering, metrics)

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:  # noqa: ARG002
        """The one generation thread."""
        return self._manager


class SteeredGeneration(GenerateManager):
    """Transformers' generation thread; a request runs under the admission in the context that submits it."""

    def __init__(self, steering: Steering, metrics: Metrics) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steering = steering
        self._metrics = metrics

    def generate_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, but end the stream with an error if the server stops before it is complete.

        Raises:
            StateError: `model` is not the one that is steered.
            StoppingError: the server is stopping.
        """
        steered, turn = self._steered(model)
        queue, streamer = super().generate_streaming(steered, *args, **kwargs)

        def cut(error: StoppingError) -> None:
            queue.put_nowait(_StreamError(str(error)))

        turn.when_refused(cut)
        return queue, streamer

    async def generate_non_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does. If this is cancelled, generation goes on until the turn is given up.

        Raises:
            StateError: `model` is not the one that is steered.
            StoppingError: the server stops before the answer is complete.
        """
        steered, turn = self._steered(model)
        return await turn.or_refused(super().generate_non_streaming(steered, *args, **kwargs))

    def _steered(self, model: Any) -> tuple[Any, Turn]:
        if not self._steering.is_attached_to(model):
            raise StateError("the model was loaded anew, without its steering; restart the server")
        generating()
        turn = TURN.get()
        turn.ask()
        return SteeredModel(model, self._steering, ADMISSION.get(), turn, self._metrics), turn


class SteeredModel:
    """Stand-in for a model whose `generate` takes one request's turn and is steered by its admission.

    All its other attributes are the model's.
    """

    def __init__(
        self, model: Any, steering: Steering, admission: Admission | None, turn: Turn, metrics: Metrics
    ) -> None:
        self._model = model
        self._steering = steering
        self._profile = admission.profile if admission else None
        self._label = admission.label if admission else "none"
        self._turn = turn
        self._metrics = metrics

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *, input_ids: Tensor, streamer: Any = None, **inputs: Any) -> Tensor:
        """Generate token ids `[1, prompt + new]` from `input_ids` `[1, prompt]`, and count the new ones.

        Raises:
            StateError: nobody waits for the answer any more, so nothing was generated.
        """
        if not self._turn.begin():
            raise StateError("nobody waits for this answer any more; send the request again")
        try:
            return self._generate(input_ids, streamer, inputs)
        finally:
            self._turn.end()

    def _generate(self, input_ids: Tensor, streamer: Any, inputs: dict[str, Any]) -> Tensor:
        with self._steering_by(self._profile):
            try:
                sequences: Tensor = self._model.generate(
                    input_ids=input_ids, streamer=streamer, stopping_criteria=[self._is_abandoned], **inputs
                )
            finally:  # generation for a stream that nobody reads any more ends with an exception
                if streamer is not None:
                    self._metrics.tokens(self._label, streamer.total_tokens)
        if streamer is None:
            self._metrics.tokens(self._label, sequences.shape[1] - input_ids.shape[1])
        return sequences

    def _is_abandoned(self, ids: Tensor, _scores: object, **_: Any) -> Tensor:
        return torch.full(ids.shape[:1], self._turn.abandoned.is_set(), device=ids.device)

    @contextmanager
    def _steering_by(self, profile: Profile | None) -> Iterator[None]:
        """Steer, within the block, with the contents of this profile (None: not at all), under its digest as name.

        The task's name may have other contents by now.
        """
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
