"""Steering of transformers' continuous batching, which packs tokens of several requests into one row.

`generate_batch` runs inside a block of `task` or `tasks` as `generate` does: each prompt is steered by its own
expression. A thread of transformers' calls the model with one row, which has some tokens of each request that it has
scheduled for that step; which ones is read from its batch right before. So that nobody's keys and values are taken for
another's, blocks of its cache are not shared between prompts; steps are neither compiled nor recorded as CUDA graphs.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from hones_steer._blocks import Routing
from hones_steer.errors import HonesError, RoutingError, StateError
from hones_steer.scopes import split
from hones_steer.slots import IDENTITY

Current = Callable[[], Routing | None]


@dataclass
class _Batch:
    """A steered `generate_batch`: where each of its prompts ends, and the managers it has made: one, once begun."""

    ends: tuple[int, ...]
    managers: list[Any]


_innermost: ContextVar[_Batch | None] = ContextVar("hones_steer_batch", default=None)

_SETTINGS = ("use_cuda_graph", "use_async_batching", "varlen_compile_config", "decode_compile_config")


def steered_generate_batch(generate_batch: Callable[..., Any], current: Current) -> Callable[..., Any]:
    """Wrap a model's `generate_batch`: inside the block that `current` returns, each prompt is steered as it says."""

    @functools.wraps(generate_batch)
    def steered(*args: Any, **kwargs: Any) -> Any:
        routing = current()
        if routing is None or not routing.steers:
            return generate_batch(*args, **kwargs)
        call = inspect.signature(generate_batch).bind(*args, **kwargs)
        arguments = call.arguments
        if routing.counts is not None:
            raise RoutingError(f"generate_batch() cannot run inside {routing}; use tasks(), with an item per prompt")
        if routing.per_row:
            routing.require_prompts(len(arguments["inputs"]))
        model = getattr(generate_batch, "__self__", None)
        if arguments.get("persistent_manager") or hasattr(model, "_cached_continuous_batching_manager"):
            raise RoutingError(
                f"generate_batch() inside {routing} cannot keep its manager, whose cache knows no tasks; leave out "
                "persistent_manager, and call model.destroy_cached_continuous_batching_manager() if there is one"
            )
        arguments["continuous_batching_config"] = _config(arguments, model)
        ends = routing.ends or tuple(len(prompt) for prompt in arguments["inputs"])
        batch = _Batch(ends if len(ends) > 1 else ends * len(arguments["inputs"]), [])
        token = _innermost.set(batch)
        try:
            results = generate_batch(*call.args, **call.kwargs)
        finally:
            _innermost.reset(token)
        for manager in batch.managers:  # transformers logs what ends its thread, and returns what it has by then
            error = manager.background_thread_status.fatal_error
            if isinstance(error, HonesError):
                raise error
        return results

    return steered


def steered_init(begin: Callable[..., Any], current: Current) -> Callable[..., Any]:
    """Wrap a model's `init_continuous_batching`, which `generate_batch` calls: have the manager's steps steered."""

    @functools.wraps(begin)
    def steered(*args: Any, **kwargs: Any) -> Any:
        routing, batch = current(), _innermost.get()
        if routing is None or not routing.steers:
            return begin(*args, **kwargs)
        if batch is None:
            raise RoutingError(
                f"init_continuous_batching() packs the rows of requests that come later, which {routing} cannot tell "
                "apart; use generate_batch(), or steer each step by packed()"
            )
        manager = begin(*args, **kwargs)
        batch.managers.append(manager)
        manager._generation_step = functools.partial(_step, manager, routing, batch.ends, manager._generation_step)
        return manager

    return steered


def _step(manager: Any, routing: Routing, ends: tuple[int, ...], step: Callable[[], None]) -> None:
    """Run one step of a manager, each token of its row steered as its prompt in the block `routing`.

    `ends` has the number of tokens of each prompt. A request that starts over has a longer one then: its answer so far
    is computed with it, but stays the answer.
    """
    if routing.closed:
        raise StateError(f"the block of {routing} was left while generate_batch() still runs; wait for it inside")
    pieces = []
    for request in manager.batch_processor.inputs_and_outputs.requests_in_batch:
        prompt = _prompt(request.state.request_id)
        row = prompt if routing.per_row else 0
        start = request.state.position_offset - request.query_length  # which the step's preparation has moved on
        for tokens, steered in split(routing.scopes[row], ends[prompt], start, request.query_length):
            if tokens and steered:
                pieces.append((routing.expressions[row], routing.slots[row], tokens))  # which the outer block keeps
            elif tokens:
                pieces.append(("none", IDENTITY, tokens))
    expressions, slots, counts = zip(*pieces, strict=True)
    inner = Routing(routing.steering, expressions, slots, per_row=False, counts=counts)
    inner.open()
    try:
        step()
    finally:
        inner.close()
        routing.forwards += inner.forwards


def _prompt(request_id: str) -> int:
    """The index of the prompt of a request of `generate_batch`: "req_3", or a further sequence's "req_3__child#0"."""
    return int(request_id.removeprefix("req_").partition("__child")[0])


def _config(arguments: dict[str, Any], model: Any) -> Any:
    """The continuous batching's configuration as asked for, with what steering needs.

    Raises:
        RoutingError: what was asked for would leave steps unsteered.
    """
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    generation = arguments.get("generation_config") or getattr(model, "generation_config", None)
    given = arguments.get("continuous_batching_config") or getattr(generation, "continuous_batching_config", None)
    config = ContinuousBatchingConfig() if given is None else copy.copy(given)
    for name in _SETTINGS:
        value = getattr(config, name)
        if any(value) if isinstance(value, tuple) else value:
            raise RoutingError(f"generate_batch() cannot be steered with {name} of its configuration; leave it out")
    if config.default_compile_level:
        raise RoutingError("generate_batch() cannot be steered with default_compile_level; leave it out")
    config.use_cuda_graph = config.use_async_batching = config.allow_block_sharing = False
    return config
