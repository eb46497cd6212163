"""Ablation of attention heads: what changes on some items when a head's output is replaced, for many heads cheaply.

Items are prompts, or prompts with an answer, few enough to be run together.

1. The items run once undisturbed. The states entering the layers are recorded, for as many layers as memory allows.
2. For each layer, as many heads as fit a forward are taken together. The items run again from that layer on, one copy
   of their rows for each head, with that head replaced in it.
3. A `Measurement` reads what it measures from the undisturbed forwards, and from the resumed ones.
4. At a layer whose states are not recorded the items run undisturbed once more, and the next layers' are.

The measurements: an answer's log-probability and Yes−No margins (`measurements.py`), generated text (`generated.py`),
and write-in (`write_in.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from hones_offline.running.batching import Batch, Run, gib
from hones_offline.running.cache import KVCache
from hones_offline.running.decoder import TextDecoder
from hones_offline.running.execution import Execution
from hones_offline.running.hooks import Head
from hones_offline.running.resumption import LayerInput, recorded_states, resumed_from
from hones_steer.layout import linear_shape

Base = TypeVar("Base")
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True)
class Resumption:
    """The undisturbed forwards once more from one layer on, a head of that layer replaced in each copy of the rows.

    `run` is called with the same batches in the same order, and gives the rows of all copies, copy after copy.
    """

    heads: Sequence[Head]
    unchanged: int
    """Number of layers, from the lowest on, whose keys and values are the undisturbed ones; the caches lack them."""
    run: Run

    @property
    def layer(self) -> int:
        """The lowest layer that something changes in, that of the heads."""
        return self.heads[0][0]


class Measurement(Protocol[Base, Result_co]):
    """A measurement on some items: how they are run, and what is read from their forwards."""

    copies: int
    """How many copies of the items' rows fit one forward."""
    token_count: int
    """Tokens that one copy runs, padding included."""

    def undisturbed(self, run: Run, /) -> Base:
        """Run the items with every head in place."""

    def ablated(self, resumption: Resumption, base: Base, /) -> Sequence[Result_co]:
        """Run them again with heads replaced: a result for each head. `base` is what `undisturbed` returned."""


@dataclass(frozen=True)
class _Recording(Generic[Base]):
    """The undisturbed forwards: their states at some layers, and what was measured."""

    states: dict[int, list[LayerInput]]
    base: Base


class HeadAblation(Generic[Base, Result]):
    """A measurement with every head in place, and with one replaced, for many heads.

    The states of a layer are what enters it and what its heads put out: tokens (padding included) · (hidden size +
    heads · head_dim) · bytes of the dtype. They are kept for as many layers as fit into the execution's `memory_gb`,
    one at least.
    """

    def __init__(self, decoder: TextDecoder, measurement: Measurement[Base, Result], execution: Execution) -> None:
        self.decoder, self.measurement = decoder, measurement
        layout = decoder.layout
        outputs = [layer.attn_out for layer in layout.layers if layer.attn_out is not None]
        heads_size = max((linear_shape(output) or (layout.hidden_size, 0))[0] for output in outputs)
        token_bytes = (layout.hidden_size + heads_size) * next(decoder.embedding.parameters()).element_size()
        self._layers_at_once = max(1, gib(execution.memory_gb) // (measurement.token_count * token_bytes))
        self._recording: _Recording[Base] | None = None

    @torch.no_grad()
    def undisturbed(self) -> Base:
        """The measurement with every head in place."""
        return self._recorded(0).base

    @torch.no_grad()
    def ablated(self, heads: Sequence[Head]) -> list[Result]:
        """The measurement with each of `heads` replaced."""
        results: dict[Head, Result] = {}
        for together in self._batches(heads):
            recording = self._recorded(resumed_from(self.decoder.layout, together[0][0]))
            resumption = self._resumption(together, recording)
            results.update(zip(together, self.measurement.ablated(resumption, recording.base), strict=True))
            del recording, resumption  # so that its states are gone when the next ones are recorded
        return [results[head] for head in heads]

    def _batches(self, heads: Sequence[Head]) -> Iterator[list[Head]]:
        """Heads of one layer, as many as fit a forward; lower layers first."""
        at_once = max(1, self.measurement.copies)
        for layer in sorted({layer for layer, _ in heads}):
            of_layer = [head for head in heads if head[0] == layer]
            for start in range(0, len(of_layer), at_once):
                yield of_layer[start : start + at_once]

    def _recorded(self, layer: int) -> _Recording[Base]:
        """The undisturbed forwards with the states of `layer`: run if those of that layer are not at hand."""
        if self._recording is None or layer not in self._recording.states:
            self._recording = None  # first, so that there are never two sets of states
            layout = self.decoder.layout
            layers = range(layer, min(layer + self._layers_at_once, len(layout.layers)))
            with recorded_states(layout, layers) as states:
                base = self.measurement.undisturbed(self.decoder.run)
            self._recording = _Recording(states, base)
        return self._recording

    def _resumption(self, heads: Sequence[Head], recording: _Recording[Base]) -> Resumption:
        states = recording.states[resumed_from(self.decoder.layout, heads[0][0])]
        following = iter(states)

        def run(batch: Batch, cache: KVCache | None) -> tuple[Tensor, KVCache | None]:
            return self.decoder.resume(batch, next(following), heads, cache)

        return Resumption(heads, states[0].unchanged, run)
