"""Routed experts in vLLM: where a layer keeps them, which of vLLM's kernels can be steered, and their scale tables.

vLLM multiplies all experts of a layer in two products, by a class that it chooses for the hardware and the weights.
Some of these call their method `activation` in between, with a row for each token and each expert that the router has
chosen for it, in this order; others do all in one kernel, or sort the rows first. Only the former can be steered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.platforms import current_platform

from hones_serving.expert_room import ExpertRoom
from hones_serving.settings import Settings
from hones_steer.errors import LayoutError, StateError
from hones_steer.ffns import EXPERTS, Ffn
from hones_steer.profile import ModelIdentity, Profile
from hones_steer.slots import ScaleTables
from hones_steer.store import ProfileStore

# Classes of vLLM's whose `activation` was read to have its rows in the order of (token, choice). Not their children.
STEERABLE = ["TritonExperts", "TritonWNA16Experts", "MarlinExperts"]


@dataclass(frozen=True, eq=False)
class Experts:
    """The routed experts of one decoder layer: `count` in all, with `width` neurons each.

    This worker runs those with the numbers `local`, and of each the neurons in `shard`. `name` is for a person.
    """

    name: str
    module: Any  # a RoutedExperts
    count: int
    width: int
    shard: slice
    local: tuple[int, ...]

    def kernel(self) -> Any:
        """The object of vLLM's whose `activation` runs between the two products.

        Raises:
            LayoutError: there is none, or it does not have its rows in the order of (token, choice).
        """
        method = self.module.quant_method
        kernel = getattr(method, "moe_kernel", None)
        experts = method if kernel is None else kernel.fused_experts
        if kernel is None or type(experts).__name__ not in STEERABLE:
            raise self._unsteerable(experts, "triton")
        if _quantizes_in_the_activation(experts):
            raise self._unsteerable(experts, "marlin")
        return experts

    def _unsteerable(self, kernel: Any, backend: str) -> LayoutError:
        remedy = f"start vLLM with --moe-backend {backend}"
        if current_platform.is_cpu():
            remedy = "vLLM has no other for CPUs, so use a GPU"
        return LayoutError(
            f"{self.name}: vLLM runs its experts by {type(kernel).__name__}, where their neurons cannot be scaled; "
            f"{remedy}, or leave out profiles that list neurons of experts"
        )


def _quantizes_in_the_activation(experts: Any) -> bool:
    """Whether TritonExperts runs its kernel that is activation and quantization in one, in place of `activation`."""
    return bool(
        type(experts).__name__ == "TritonExperts"
        and experts.moe_config.activation == MoEActivation.SILU
        and experts.quant_config.use_fp8_w8a8
        and experts.block_shape == [128, 128]
    )


def find_experts(name: str, layer: nn.Module) -> Experts | None:
    """Find the routed experts of a decoder layer, which errors call `name`; None if it has none.

    Raises:
        LayoutError: there are several modules of experts, or a shared expert is one of them.
    """
    found = [module for module in layer.modules() if isinstance(module, RoutedExperts)]
    if not found:
        return None
    if len(found) > 1:
        raise LayoutError(f"{name} has {len(found)} modules of routed experts; hones-steer supports one in a layer")
    module: Any = found[0]
    config, experts = module.moe_config, module.expert_map_manager
    if experts.num_fused_shared_experts:
        raise LayoutError(
            f"{name}: vLLM runs its shared expert as one of the routed ones, where hones-steer does not find it; "
            "start vLLM with VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0"
        )
    total = config.intermediate_size
    part = config.intermediate_size_per_partition if config.tp_shard_with_padding else total // config.tp_size
    start = min(config.tp_rank * part, total)
    return Experts(
        name=name,
        module=module,
        count=config.num_logical_experts,
        width=total,
        shard=slice(start, min(start + part, total)),
        local=tuple(number for number in range(config.num_logical_experts) if experts.is_local_expert(number)),
    )


class MixtureTables(ScaleTables):
    """Tables of all dense FFNs and shared experts, and of some routed experts: of any `count` at a time.

    `rows`, float32 `[slots * (count + 1), w]`, has the scales of w neurons for each slot and in it for each table.
    `numbers`, int64 `[layers with experts, experts]`, has the table of each expert, counted from 1; experts without one
    have table 0, the identity. So the scales of an expert for a slot are in the row slot * (count + 1) + number.

    `experts` has those of each layer, by the layer's number; `places` and `slots` are ScaleTables'.

    Raises:
        LayoutError: the experts of two layers differ.
    """

    def __init__(
        self,
        places: Mapping[Ffn, tuple[torch.device, slice]],
        slots: int,
        experts: Mapping[int, Experts],
        count: int,
    ) -> None:
        super().__init__(places, slots)
        first = next(iter(experts.values()))
        for of in experts.values():
            if (of.count, of.width, of.shard, of.local) != (first.count, first.width, first.shard, first.local):
                raise LayoutError(
                    f"{of.name} has {of.count} experts of {of.width} neurons and {first.name} {first.count} of "
                    f"{first.width}; hones-steer supports one kind of experts in vLLM"
                )
        device = next(first.module.parameters()).device
        self._shard = first.shard
        self._layers = tuple(experts)
        self.each = count + 1  # tables of one slot
        self.rows = torch.ones(slots * self.each, first.shard.stop - first.shard.start, device=device)
        self.numbers = torch.zeros(len(experts), first.count, dtype=torch.int64, device=device)
        self.room = ExpertRoom(count, frozenset(first.local), frozenset(experts))
        self._numbers = np.zeros(self.numbers.shape, np.int64)  # the same on the CPU
        self._tables: dict[Ffn, int] = {}  # which expert has which table, in the order in which they got it
        self._free = list(range(count, 0, -1))
        self._profiles: dict[int, Profile] = {}  # slot -> what is written there
        self._ready: set[str] = set()  # digests of profiles all of whose experts have tables

    def numbers_of(self, layer: int) -> torch.Tensor:
        """The table of each expert of a layer, int64 `[experts]`, as a view."""
        return self.numbers[self._layers.index(layer)]

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the tables of routed experts take."""
        return self.rows.nbytes + self.numbers.nbytes

    def write(self, slot: int, profile: Profile) -> None:
        """Write a profile's scales to a slot; experts that have no table are left out, so `require` them before."""
        super().write(slot, profile)
        if (before := self._profiles.get(slot)) is not None:
            self._ready.discard(before.digest)
        self._profiles[slot] = profile
        self._write_experts(slot)

    def require(self, profiles: Iterable[Profile]) -> None:
        """Give every expert of which these profiles list neurons a table, if need be that of one that none of them has.

        Raises:
            StateError: there are fewer tables than such experts.
        """
        profiles = list(profiles)
        if all(profile.digest in self._ready for profile in profiles):
            return
        needed = self.room.listed(profiles)
        if missing := sorted(needed - self._tables.keys()):
            self._make_room(len(missing), needed)
            for ffn in missing:
                self._tables[ffn] = self._free.pop()
                self._numbers[self._place(ffn)] = self._tables[ffn]
            self.numbers.copy_(torch.from_numpy(self._numbers))
            for slot in self._profiles:
                self._write_experts(slot)
        self._ready.update(profile.digest for profile in profiles)

    def _place(self, ffn: Ffn) -> tuple[int, int]:
        """Where `numbers` has an expert's table."""
        return self._layers.index(ffn.layer), int(ffn.part)

    def _make_room(self, count: int, needed: Collection[Ffn]) -> None:
        """Take tables from experts that are not `needed`, until `count` are free; first those that were given first."""
        spare = [ffn for ffn in self._tables if ffn not in needed]
        lacking = count - len(self._free)
        if lacking > len(spare):
            raise StateError(
                f"{len(needed)} experts are steered at once, but there are tables for {self.room.tables}; "
                "restart the server with a larger --max-expert-tables"
            )
        for ffn in spare[: max(0, lacking)]:
            self._free.append(self._tables.pop(ffn))
            self._numbers[self._place(ffn)] = 0
            self._ready.clear()

    def _write_experts(self, slot: int) -> None:
        """Write a slot's rows anew: its profile's scales, and 1 where that lists nothing."""
        groups = self._profiles[slot].ffns.groups
        values = np.ones((self.each, self.rows.shape[1]), np.float32)
        for of_layer, layer in zip(self._numbers, self._layers, strict=True):
            if (entries := groups.get(Ffn(layer, EXPERTS))) is not None:
                tables = of_layer[entries.experts]
                kept = (tables > 0) & (entries.neurons >= self._shard.start) & (entries.neurons < self._shard.stop)
                values[tables[kept], entries.neurons[kept] - self._shard.start] = entries.scales[kept]
        # One piece of memory: nothing is allocated on the device.
        self.rows[slot * self.each : (slot + 1) * self.each].copy_(torch.from_numpy(values))


def mixture_tables(
    places: Mapping[Ffn, tuple[torch.device, slice]],
    slots: int,
    experts: Mapping[int, Experts],
    identity: ModelIdentity,
    settings: Settings,
) -> MixtureTables:
    """Tables for the routed experts that the folder's profiles list, and as many more as the settings say.

    `identity` is the model's; the rest is MixtureTables'.

    Raises:
        ProfileError: the folder cannot be read, or a file in it.
        RoomError: the settings say too few.
        LayoutError: the experts of two layers differ.
    """
    store = ProfileStore(settings.profiles)
    read = [store.get(name) for name in store.names()]
    # Others are not for this model; the front will say so.
    profiles = [profile for profile in read if profile.base_model.runs == identity.runs]
    none = ExpertRoom(0, frozenset(next(iter(experts.values())).local), frozenset(experts))
    wanted, most = settings.max_expert_tables, len(none.experts) * len(none.layers)
    room = none._replace(tables=len(none.listed(profiles)) if wanted is None else min(wanted, most))
    room.require(profiles)
    tables = MixtureTables(places, slots, experts, room.tables)
    tables.require(profiles)
    return tables
