"""Scale tables, and the allocation of their slots to profiles.

Every FFN has one float32 table `[slots, I]`, where I is its width. Slot 0 is the identity; every
other slot holds one profile at a time. A batch row picks its scales by slot number. All tensors are allocated once and
written in place, so that compiled code and CUDA graphs that have read them once see every later change.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from hones_steer.errors import RoutingError
from hones_steer.ffns import EXPERTS, Ffn, run_of
from hones_steer.profile import Profile

IDENTITY = 0
_INITIAL_ROWS = 256


class ScaleTables:
    """Tables `[slots, I]`, one per FFN and on its device; slot 0 is never written.

    `places` has each FFN's device, and the range of its neurons that this process holds: under tensor parallelism a
    part of them. Its table is as wide as that.
    """

    def __init__(self, places: Mapping[Ffn, tuple[torch.device, slice]], slots: int) -> None:
        self._shards = {ffn: shard for ffn, (_, shard) in places.items()}
        self.tables = {
            ffn: _static((slots, shard.stop - shard.start), torch.float32, device, 1)
            for ffn, (device, shard) in places.items()
        }

    def write(self, slot: int, profile: Profile) -> None:
        """Write a profile's scales to a slot; neurons that it does not list get scale 1."""
        with torch.inference_mode(False), torch.no_grad():
            for ffn, table in self.tables.items():
                table[slot].copy_(scale_row(profile, ffn)[self._shards[ffn]])


class RowSlots:
    """The slot of each batch row, int64 `[rows]` on one device, of which a forward uses as many as it has rows."""

    def __init__(self, device: torch.device) -> None:
        self.index = _static((_INITIAL_ROWS,), torch.int64, device, IDENTITY)

    def write(self, slots: Sequence[int], rows: int) -> None:
        """Set the slots of the first `rows` rows; a single slot stands for all rows."""
        if rows > len(self.index):
            self.index = _static((2 * rows,), torch.int64, self.index.device, IDENTITY)
        with torch.inference_mode(False), torch.no_grad():
            if len(slots) == 1:
                self.index.fill_(slots[0])
            else:
                self.index[: len(slots)].copy_(torch.tensor(slots))


class SlotPool:
    """Allocates slots of the tables to profiles: pinned while in use, else given away least recently used first."""

    def __init__(self, tables: ScaleTables, max_profiles: int) -> None:
        self._tables = tables
        self._max_profiles = max_profiles
        self._slots: OrderedDict[str, int] = OrderedDict()  # digest -> slot, least recently used first
        self._pins: Counter[str] = Counter()

    def acquire(self, profiles: Iterable[Profile | None]) -> tuple[int, ...]:
        """Write these profiles (None: the identity) to slots, pinned until `release`; return the slots.

        Raises RoutingError, and pins none, if more distinct profiles than `max_profiles` would be in use at once.
        """
        profiles = list(profiles)
        by_digest = {profile.digest: profile for profile in profiles if profile is not None}
        in_use = len(by_digest.keys() | self._pins.keys())
        if in_use > self._max_profiles:
            raise RoutingError(
                f"{in_use} different profiles would be in use at once, but max_profiles is {self._max_profiles}; "
                "use fewer, or pass a larger max_profiles to steer()"
            )
        for digest in by_digest.keys() & self._slots.keys():
            self._slots.move_to_end(digest)
        self._pins.update(by_digest.keys())
        for digest, profile in by_digest.items():
            if digest not in self._slots:
                slot = self._free_slot()
                self._tables.write(slot, profile)
                self._slots[digest] = slot
        return tuple(IDENTITY if profile is None else self._slots[profile.digest] for profile in profiles)

    def release(self, profiles: Iterable[Profile | None]) -> None:
        """Undo the pinning of one `acquire` of the same profiles."""
        self._pins -= Counter({profile.digest for profile in profiles if profile is not None})

    def _free_slot(self) -> int:
        if len(self._slots) < self._max_profiles:
            return len(self._slots) + 1
        oldest = next(digest for digest in self._slots if digest not in self._pins)
        return self._slots.pop(oldest)


def scale_row(profile: Profile, ffn: Ffn) -> Tensor:
    """The scales of one FFN as a dense float32 row `[I]` on the CPU, 1 where the profile lists nothing.

    For all experts of a layer, whose part is "experts", the row has one expert after the other, `[experts · I]`.
    """
    width = profile.base_model.width(ffn)
    if ffn.part == EXPERTS and ffn in profile.ffns.groups:
        entries = profile.ffns.groups[ffn]
        of_each = run_of(profile.base_model.runs, ffn.layer).expert_width
        return dense_row(entries.positions(of_each), entries.scales, width)
    neurons, scales = profile.ffns.get(ffn, ((), ()))
    return dense_row(neurons, scales, width)


def ffn_tensors(profile: Profile, ffn: Ffn) -> tuple[Tensor, Tensor]:
    """The neurons int64 `[k]` and scales float32 `[k]` of an FFN that the profile lists."""
    neurons, scales = profile.ffns[ffn]
    return torch.tensor(neurons, dtype=torch.int64), torch.tensor(scales)


def dense_row(neurons: Any, scales: Any, width: int) -> Tensor:
    """A float32 row `[width]` with `scales` `[k]` at `neurons` `[k]` and 1 everywhere else.

    Both may be arrays, sequences or tensors; gradients flow to scales that are a tensor.
    """
    index, values = (
        part.to(dtype) if isinstance(part, Tensor) else torch.tensor(part, dtype=dtype)
        for part, dtype in ((neurons, torch.int64), (scales, torch.float32))
    )
    return torch.ones(width).index_put((index,), values)


def _static(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, fill: int) -> Tensor:
    """A tensor that CUDA graphs read in place, instead of copying it before every replay."""
    with torch.inference_mode(False):
        tensor = torch.full(shape, fill, dtype=dtype, device=device)
    torch._dynamo.mark_static_address(tensor)
    return tensor
