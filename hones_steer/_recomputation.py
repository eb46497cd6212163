"""Forwards with gradients, remembered so that a backward() can tell which of them it recomputes.

With gradient checkpointing, backward() runs the decoder layers again, perhaps in another thread and long after another
task was chosen. A recomputation runs on behalf of an autograd node, and nodes are numbered in the order in which their
thread makes them, so a node's number lies between those at the beginning and at the end of its forward.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import torch

from hones_steer._blocks import Routing
from hones_steer.errors import StateError
from hones_steer.slots import IDENTITY

_REMEMBERED = 1024  # forwards


class ForwardsWithGradients:
    """The latest forwards with gradients, each with the slots of its rows and the autograd nodes it made.

    `latest_slots` are those of the latest one.
    """

    def __init__(self) -> None:
        self.latest_slots: tuple[int, ...] = (IDENTITY,)
        self._forwards: deque[_Forward] = deque(maxlen=_REMEMBERED)
        self._any_steered = False

    def begin(self, routing: Routing | None, slots: tuple[int, ...]) -> None:
        """Note that a forward begins in this thread, inside the block of `routing`, with these slots."""
        self.latest_slots = slots
        self._any_steered |= slots != (IDENTITY,)
        thread, node = threading.get_ident(), _next_node()
        latest = self._forwards[-1] if self._forwards else None
        if latest is not None and latest.continues(thread, routing, slots, node):
            latest.end = None
        else:
            self._forwards.append(_Forward(thread, routing, slots, node))

    def end(self) -> None:
        """Note that the latest forward, if it is still running, has ended."""
        if self._forwards and (latest := self._forwards[-1]).end is None:
            latest.end = _next_node()

    def slots_of_recomputation(self, layer: str) -> tuple[int, ...]:
        """The slots of the rows of the forward that the calling backward() recomputes, in `layer`.

        Raises StateError if the forward's block was left, or if it cannot be told which forward it is.
        """
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        candidates = [forward for forward in self._forwards if forward.made(number)]
        for forward in candidates:
            if forward.routing is not None and forward.routing.closed and forward.routing.steers:
                raise StateError(
                    f"backward() recomputes a forward of {forward.routing}, whose block was left; with gradient "
                    "checkpointing call backward() inside the block"
                )
        slots = {forward.slots for forward in candidates}
        if len(slots) == 1:
            return slots.pop()
        if not slots and not self._any_steered:
            return (IDENTITY,)
        raise StateError(
            f"backward() recomputes {layer}, and it cannot be told for which forward; with gradient checkpointing call "
            "the model itself, model(...), run differently steered forwards in one thread, and do not nest checkpoints"
        )


@dataclass
class _Forward:
    """A forward, or several alike in a row, that made the nodes numbered from `start` to below `end`.

    `end` is None while it is running.
    """

    thread: int
    routing: Routing | None
    slots: tuple[int, ...]
    start: int
    end: int | None = None

    def continues(self, thread: int, routing: Routing | None, slots: tuple[int, ...], node: int) -> bool:
        """Whether a forward that begins at `node` is like this one and follows it."""
        same = self.thread == thread and self.routing is routing and self.slots == slots
        return same and self.end is not None and node >= self.end

    def made(self, number: int) -> bool:
        """Whether it may have made the node with this number; threads number their nodes independently."""
        return self.start <= number and (self.end is None or number < self.end)


def _next_node() -> int:
    """The number of the next autograd node that this thread makes."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number
