"""The scales of a profile: which neurons of which FFNs, and each one's factor, checked against the model's FFNs.

All routed experts of a layer are kept together, as `Entries` with the expert of each neuron, because a model has
thousands of them; `FfnScales` shows them one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from hones_steer.errors import ProfileError
from hones_steer.ffns import DENSE, EXPERTS, SHARED, Ffn, run_of
from hones_steer.identity import ModelIdentity

Neurons: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int32]]
Scales: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float32]]

MAX_SCALE = 100.0


class Entries(NamedTuple):
    """Neurons int32[k] of one FFN and their scales float32[k], or of all experts of a layer, with each one's expert.

    `experts` is int32[k]; it is None where there is only one FFN. Entries ascend by expert, then by neuron.
    """

    neurons: Neurons
    scales: Scales
    experts: Neurons | None = None

    @property
    def keys(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """A number for each entry, int64[k], that orders and identifies it."""
        neurons = self.neurons.astype(np.int64)
        return neurons if self.experts is None else (self.experts.astype(np.int64) << 32) | neurons

    def positions(self, width: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Each entry's place, int64[k], among all neurons of the group, whose FFNs have `width` neurons each."""
        neurons = self.neurons.astype(np.int64)
        return neurons if self.experts is None else self.experts.astype(np.int64) * width + neurons


class FfnScales(Mapping[Ffn, tuple[Neurons, Scales]]):
    """The neurons int32[k] and scales float32[k] of each FFN that is listed, k >= 1, read-only.

    FFNs ascend by layer, and in a layer the dense one comes first, then the shared one, then experts by number.
    `groups` has the same with all experts of a layer together, under (layer, "experts").
    """

    def __init__(self, groups: Mapping[Ffn, Entries]) -> None:
        order = sorted(groups, key=lambda ffn: ffn.order)
        self.groups: Mapping[Ffn, Entries] = MappingProxyType({ffn: groups[ffn] for ffn in order})

    def __getitem__(self, key: tuple[int, str | int]) -> tuple[Neurons, Scales]:
        if not isinstance(key, tuple) or len(key) != 2 or key[1] == EXPERTS:  # which names no single FFN
            raise KeyError(key)
        ffn = Ffn(*key)
        entries = self.groups[ffn.group]
        if entries.experts is None:
            return entries.neurons, entries.scales
        start, stop = np.searchsorted(entries.experts, [ffn.part, int(ffn.part) + 1])
        if start == stop:
            raise KeyError(key)
        return entries.neurons[start:stop], entries.scales[start:stop]

    def __iter__(self) -> Iterator[Ffn]:
        for ffn, entries in self.groups.items():
            if entries.experts is None:
                yield ffn
            else:
                yield from (Ffn(ffn.layer, int(expert)) for expert in np.unique(entries.experts))

    def __len__(self) -> int:
        return sum(1 if of.experts is None else len(np.unique(of.experts)) for of in self.groups.values())

    def __repr__(self) -> str:
        return repr({tuple(ffn): pair for ffn, pair in self.items()})

    @property
    def num_neurons(self) -> int:
        """Number of neurons listed, over all FFNs."""
        return sum(len(entries.neurons) for entries in self.groups.values())

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the FFNs listed, ascending."""
        return tuple(sorted({ffn.layer for ffn in self.groups}))


class DenseLayers(Mapping[int, tuple[Neurons, Scales]]):
    """The scales of a profile that lists dense FFNs only, by layer.

    Where the profile lists experts, whatever is asked of it raises ProfileError, so that nobody misses them; `ffns`
    has all.
    """

    def __init__(self, ffns: FfnScales) -> None:
        self.ffns = ffns

    def __repr__(self) -> str:
        return repr(self.ffns)

    def _require_dense(self) -> None:
        if (other := next((ffn for ffn in self.ffns.groups if ffn.part != DENSE), None)) is not None:
            raise ProfileError(f"the profile lists {other}, and `layers` has dense FFNs only; use `ffns`")

    def __getitem__(self, layer: int) -> tuple[Neurons, Scales]:
        self._require_dense()
        if (layer, DENSE) not in self.ffns.groups:
            raise KeyError(layer)
        return self.ffns[Ffn(layer, DENSE)]

    def __iter__(self) -> Iterator[int]:
        self._require_dense()
        return (ffn.layer for ffn in self.ffns.groups)

    def __len__(self) -> int:
        self._require_dense()
        return len(self.ffns.groups)


def checked_scales(layers: object, base_model: ModelIdentity) -> FfnScales:
    """Check the scales that a profile is made of: a mapping from a layer, or an FFN, to (neurons, scales).

    Raises:
        ProfileError: they are none, or not of FFNs and neurons that the model has; the message names the culprit.
    """
    if isinstance(layers, DenseLayers):
        layers = layers.ffns
    groups = layers.groups if isinstance(layers, FfnScales) else _grouped(layers, base_model)
    if not groups:
        raise ProfileError("there are no layers, so nothing to steer; list at least one neuron")
    return FfnScales({ffn: _checked_entries(ffn, entries, base_model) for ffn, entries in groups.items()})


def _grouped(layers: object, base_model: ModelIdentity) -> dict[Ffn, Entries]:
    if not isinstance(layers, Mapping):
        raise ProfileError(f"layers is a {type(layers).__name__}; give a mapping from layer to (neurons, scales)")
    groups: dict[Ffn, Entries] = {}
    stacks: dict[Ffn, dict[Ffn, Entries]] = {}
    for key, pair in layers.items():
        ffn = Ffn.of(key)
        check_ffn(ffn, base_model)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ProfileError(f"{ffn}: give a pair (neurons, scales)")
        entries = _frozen(ffn, Entries(pair[0], pair[1]))
        if ffn == ffn.group:
            groups[ffn] = entries
        else:
            stacks.setdefault(ffn.group, {})[ffn] = entries
    return groups | {group: _stacked(experts) for group, experts in stacks.items()}


def _stacked(experts: Mapping[Ffn, Entries]) -> Entries:
    ordered = sorted(experts.items(), key=lambda item: int(item[0].part))
    numbers = np.concatenate([np.full(len(of.neurons), ffn.part, np.int32) for ffn, of in ordered])
    neurons, scales = (np.concatenate([of[i] for _, of in ordered]) for i in (0, 1))
    return Entries(neurons, scales, numbers)


def check_ffn(ffn: Ffn, base_model: ModelIdentity) -> None:
    """Check that the model has such an FFN; raises ProfileError, saying what it has, if not."""
    if not 0 <= ffn.layer < base_model.num_layers:
        raise ProfileError(f"layer {ffn.layer} does not exist: the model has layers 0 to {base_model.num_layers - 1}")
    if not base_model.width(ffn):
        names = {DENSE: "dense FFN", SHARED: "shared expert", EXPERTS: "experts"}
        what = names.get(str(ffn.part), f"expert {ffn.part}")
        raise ProfileError(f"layer {ffn.layer} has no {what}; it has {run_of(base_model.runs, ffn.layer)}")


def _frozen(ffn: Ffn, entries: Entries) -> Entries:
    """Read-only copies of the arrays, of the right types and lengths."""
    prefix = ffn.prefix
    neurons = _frozen_array(entries.neurons, np.dtype(np.int32), f"{prefix}.neurons")
    scales = _frozen_array(entries.scales, np.dtype(np.float32), f"{prefix}.scales")
    if len(neurons) != len(scales):
        raise ProfileError(f"{ffn} has {len(neurons)} neurons and {len(scales)} scales; give one scale each")
    if len(neurons) == 0:
        verb = "list" if ffn.part == EXPERTS else "lists"
        raise ProfileError(f"{ffn} {verb} no neurons; leave {'the layer' if ffn.part == DENSE else 'this'} out")
    if entries.experts is None:
        return Entries(neurons, scales)
    experts = _frozen_array(entries.experts, np.dtype(np.int32), f"{prefix}.index")
    if len(neurons) != len(experts):
        raise ProfileError(f"{ffn} have {len(neurons)} neurons and an index of {len(experts)}; give one expert each")
    return Entries(neurons, scales, experts)


def _frozen_array(value: object, dtype: np.dtype[Any], where: str) -> Any:
    if not isinstance(value, np.ndarray):
        raise ProfileError(f"{where} is a {type(value).__name__}; give a numpy array of dtype {dtype}")
    if value.dtype != dtype:
        raise ProfileError(f"{where} has dtype {value.dtype}, expected {dtype}; convert it with .astype")
    if value.ndim != 1:
        raise ProfileError(f"{where} has shape {value.shape}, expected one dimension")
    # Adding 0 turns -0 into 0, so that equal scales have equal bytes.
    # Backed by bytes: unlike a copy with writeable=False, it cannot be made writable again.
    return np.frombuffer((value + dtype.type(0)).tobytes(), dtype=dtype)


def _checked_entries(ffn: Ffn, entries: Entries, base_model: ModelIdentity) -> Entries:
    check_ffn(ffn, base_model)
    entries = _frozen(ffn, entries)
    run = run_of(base_model.runs, ffn.layer)
    width = run.width(ffn.part)
    if entries.experts is not None:
        _check_range(entries.experts, run.experts, f"{ffn.prefix}.index")
        width = run.expert_width
    _check_range(entries.neurons, width, f"{ffn.prefix}.neurons")
    _check_ascending(ffn, entries)
    bad = np.flatnonzero(~(np.abs(entries.scales) <= MAX_SCALE))  # also true for NaN
    if len(bad):
        neuron, scale = entries.neurons[bad[0]], entries.scales[bad[0]]
        expert = "" if entries.experts is None else f" of expert {entries.experts[bad[0]]}"
        allowed = f"at most {MAX_SCALE:g} in magnitude" if np.isfinite(scale) else "finite"
        raise ProfileError(f"{ffn.prefix}.scales is {scale} at neuron {neuron}{expert}; scales must be {allowed}")
    return entries


def _check_ascending(ffn: Ffn, entries: Entries) -> None:
    keys = entries.keys
    descents = np.flatnonzero(keys[1:] <= keys[:-1])
    if not len(descents):
        return
    first, second = descents[0], descents[0] + 1
    a, b = entries.neurons[first], entries.neurons[second]
    how, expert = ("is listed twice" if a == b else f"follows {a}"), ""
    if entries.experts is not None:
        e, f = entries.experts[first], entries.experts[second]
        if e != f:
            raise ProfileError(f"{ffn.prefix}.index is not ascending: expert {f} follows {e}")
        expert = f" of expert {f}"
    raise ProfileError(f"{ffn.prefix}.neurons is not strictly increasing: neuron {b}{expert} {how}")


def _check_range(numbers: Neurons, count: int, where: str) -> None:
    for number in (numbers.min(), numbers.max()):
        if not 0 <= number < count:
            raise ProfileError(f"{where} contains {number}, outside 0 to {count - 1}")


def blended(terms: Sequence[tuple[FfnScales, float]]) -> FfnScales:
    """Add weighted scales: 1 + Σ weight · (scale − 1) at every neuron that any of the terms lists.

    Computed in float64 as Σ weight · scale + (1 − Σ weight), which keeps weight 1 and weight 0 exact, then rounded to
    float32. The result may be infinite or NaN, which `checked_scales` refuses.
    """
    groups = {ffn for scales, _ in terms for ffn in scales.groups}
    parts = {ffn: [(of.groups[ffn], weight) for of, weight in terms if ffn in of.groups] for ffn in groups}
    return FfnScales({ffn: _blended_entries(of) for ffn, of in parts.items()})


def _blended_entries(parts: Iterable[tuple[Entries, float]]) -> Entries:
    keyed = [(entries.keys, entries, weight) for entries, weight in parts]
    union, first = np.unique(np.concatenate([keys for keys, _, _ in keyed]), return_index=True)
    total, rest = np.zeros(len(union)), np.ones(len(union))
    with np.errstate(over="ignore", invalid="ignore"):
        for keys, entries, weight in keyed:
            positions = np.searchsorted(union, keys)
            total[positions] += weight * entries.scales.astype(np.float64)
            rest[positions] -= weight
        scales = (total + rest).astype(np.float32)
    neurons = np.concatenate([entries.neurons for _, entries, _ in keyed])[first]
    experts = [entries.experts for _, entries, _ in keyed if entries.experts is not None]
    return Entries(neurons, scales, np.concatenate(experts)[first] if experts else None)
