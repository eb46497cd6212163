"""The neurons of a decoder's FFNs: how they are numbered, how important they are for a task, and banks of them.

No other module knows how layers and their widths make up the set of all neurons, so that FFNs of another kind are a
change in this one. docs/methods.md has the definitions.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hones_steer.errors import DataError, ProfileError
from hones_steer.ffns import DENSE, EXPERTS, SHARED, Ffn, FfnRun
from hones_steer.layout import Layout

FfnKey: TypeAlias = int | Ffn
"""Address of an FFN in a bank: a layer's number for its dense FFN, else (layer, "shared" or an expert's number)."""


@dataclass(frozen=True)
class NeuronIndex:
    """All N FFN neurons of a decoder, numbered layer after layer from 0.

    In a layer come those of its dense FFN, then of its shared expert, then of its routed experts, one after the other.
    A vector over all neurons is [N]; `vector[..., index[ffn]]` is the part of an FFN, or of all experts of a layer.
    """

    layers: tuple[FfnRun, ...]
    """The FFNs of each layer."""

    @classmethod
    def of(cls, layout: Layout) -> "NeuronIndex":
        """The neurons of a model."""
        return cls(tuple(FfnRun(layer.index, layer.index + 1, **layer.widths) for layer in layout.layers))

    @classmethod
    def dense(cls, widths: Sequence[int]) -> "NeuronIndex":
        """The neurons of a decoder with a dense FFN of this width in each layer; 0 for a layer without one."""
        return cls(tuple(FfnRun(layer, layer + 1, dense=width) for layer, width in enumerate(widths)))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The number of each layer's neurons, of all its FFNs."""
        return tuple(run.num_neurons for run in self.layers)

    @cached_property
    def groups(self) -> Mapping[Ffn, slice]:
        """The numbers of the neurons of each FFN, all experts of a layer being one, in their order."""
        groups, start = dict[Ffn, slice](), 0
        for layer, run in enumerate(self.layers):
            for part in (DENSE, SHARED, EXPERTS):
                if width := run.width(part):
                    groups[Ffn(layer, part)] = slice(start, start + width)
                    start += width
        return groups

    @cached_property
    def size(self) -> int:
        """N, the number of neurons."""
        return sum(self.widths)

    def __getitem__(self, group: Ffn) -> slice:
        """The numbers of the neurons of an FFN, or of all experts of a layer."""
        return self.groups[group]

    def layer(self, layer: int) -> slice:
        """The numbers of a layer's neurons."""
        start = sum(self.widths[:layer])
        return slice(start, start + self.widths[layer])

    def width(self, key: FfnKey) -> int:
        """Number of neurons of one FFN; 0 if there is none."""
        ffn = Ffn.of(key)
        return self.layers[ffn.layer].width(ffn.part) if 0 <= ffn.layer < len(self.layers) else 0

    def bank(self, numbers: npt.NDArray[np.intp]) -> "Bank":
        """The bank of the neurons with these numbers, ascending."""
        ffns: dict[FfnKey, npt.NDArray[np.intp]] = {}
        for group, places in self.groups.items():
            within = numbers[slice(*np.searchsorted(numbers, (places.start, places.stop)))] - places.start
            if group.part != EXPERTS:
                ffns[group] = within
            elif len(within):
                width = self.layers[group.layer].expert_width
                experts, firsts = np.unique(within // width, return_index=True)
                parts = np.split(within % width, firsts[1:])
                ffns |= {Ffn(group.layer, int(e)): part for e, part in zip(experts, parts, strict=True)}
        return Bank(ffns)


class Bank(Mapping[FfnKey, npt.NDArray[np.int32]]):
    """A set of neurons: {FFN: strictly increasing neuron indices, int32}; FFNs without neurons are absent.

    A dense FFN goes by its layer's number alone, others by (layer, "shared") or (layer, expert).

    Raises:
        DataError: an FFN's neurons are no integers, or not in increasing order, each once, or its address is none.
    """

    def __init__(self, ffns: Mapping[Any, npt.NDArray[Any] | Sequence[int]]) -> None:
        self._ffns = {_key(key): _indices(_key(key), np.asarray(own)) for key, own in ffns.items() if len(own)}

    def __getitem__(self, key: Any) -> npt.NDArray[np.int32]:
        return self._ffns[key]

    def __iter__(self) -> Iterator[FfnKey]:
        return iter(self._ffns)

    def __len__(self) -> int:
        return len(self._ffns)

    def __repr__(self) -> str:
        return f"Bank({self.to_json()})"

    @property
    def size(self) -> int:
        """Number of neurons in the bank."""
        return sum(len(neurons) for neurons in self.values())

    @property
    def digest(self) -> str:
        """16 hex digits that stand for the bank's neurons."""
        digest = hashlib.sha256()
        for key in self.ascending():
            digest.update(f"{Ffn.of(key).key}:{self[key].tolist()};".encode())
        return digest.hexdigest()[:16]

    def ascending(self) -> list[FfnKey]:
        """The FFNs of the bank, ascending by layer, dense before shared before experts by number."""
        return sorted(self, key=_order)

    def in_layer(self, layer: int) -> int:
        """Number of neurons of a layer, of all its FFNs."""
        return sum(len(neurons) for key, neurons in self.items() if Ffn.of(key).layer == layer)

    def pairs(self) -> list[tuple[FfnKey, int]]:
        """(FFN, neuron) of every neuron."""
        return [(key, neuron) for key, neurons in self.items() for neuron in neurons.tolist()]

    def split(self, values: npt.NDArray[Any]) -> dict[FfnKey, npt.NDArray[Any]]:
        """A vector [size], one value for each neuron in the bank's order, as {FFN: [neurons]}."""
        cuts = np.cumsum([len(neurons) for neurons in self.values()])[:-1]
        return dict(zip(self, np.split(values, cuts), strict=True))

    def only(self, kept: npt.NDArray[np.bool_]) -> "Bank":
        """The neurons that are `kept`, bool [size] in the bank's order."""
        return Bank({key: self[key][part] for key, part in self.split(kept).items()})

    def positions(self, index: NeuronIndex) -> dict[Ffn, tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
        """Each neuron's place in its FFN, or among all experts of its layer, and its place in the bank, each [k]."""
        found: dict[Ffn, list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]] = {}
        for key, places in self.split(np.arange(self.size)).items():
            ffn = Ffn.of(key)
            start = 0 if isinstance(ffn.part, str) else ffn.part * index.width(ffn)
            found.setdefault(ffn.group, []).append((start + self[key].astype(np.intp), places))
        return {
            group: (np.concatenate([own for own, _ in parts]), np.concatenate([places for _, places in parts]))
            for group, parts in found.items()
        }

    def numbers(self, index: NeuronIndex) -> npt.NDArray[np.intp]:
        """The numbers of its neurons, ascending."""
        return np.sort(np.concatenate([index[ffn].start + own for ffn, (own, _) in self.positions(index).items()]))

    def to_json(self) -> dict[str, list[int]]:
        """The bank as JSON files hold it, by `Ffn.key`."""
        return {Ffn.of(key).key: neurons.tolist() for key, neurons in self.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Sequence[int]]) -> "Bank":
        """The bank of `to_json`; raises DataError, ProfileError or ValueError if it is none."""
        return cls({Ffn.parse(key): np.array(neurons, dtype=np.int32) for key, neurons in value.items()})

    def random(self, index: NeuronIndex, seed: int) -> "Bank":
        """A random bank with as many neurons in each FFN, drawn from all of the FFN's neurons."""
        rng = np.random.default_rng(seed)
        return Bank(
            {key: np.sort(rng.choice(index.width(key), len(neurons), replace=False)) for key, neurons in self.items()}
        )

    def check(self, index: NeuronIndex) -> None:
        """Raise DataError if the bank is empty, or names layers, FFNs or neurons that the model does not have."""
        if not self:
            raise DataError("the bank is empty; there is nothing to learn or mask")
        for key, neurons in self.items():
            layer = Ffn.of(key).layer
            if not 0 <= layer < len(index.layers):
                raise DataError(
                    f"the bank names layer {layer}, but the model has {len(index.layers)}; "
                    "use a bank made for this model"
                )
            width = index.width(key)
            if not width and (isinstance(key, Ffn) or index.layers[layer].experts):
                raise DataError(
                    f"the bank names {Ffn.of(key)}, but that layer of the model has {index.layers[layer]}; "
                    "use a bank made for this model"
                )
            if neurons[0] < 0 or neurons[-1] >= width:
                raise DataError(
                    f"the bank's {Ffn.of(key)} names neurons outside [0, {width}), the model's width; "
                    "use a bank made for this model"
                )


def _key(key: object) -> FfnKey:
    try:
        ffn = Ffn.of(key)
    except ProfileError as error:
        raise DataError(f"the bank names an FFN that is none: {error}") from error
    return ffn.layer if ffn.part == DENSE else ffn


def _order(key: FfnKey) -> tuple[int, int, int]:
    return Ffn.of(key).order


def _indices(key: FfnKey, neurons: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    if neurons.dtype.kind not in "iu" or int(neurons.max()) > np.iinfo(np.int32).max:
        raise DataError(f"the bank's {Ffn.of(key)} holds {neurons.dtype} {neurons.max()}; give neuron indices")
    if (np.diff(neurons.astype(np.int64)) <= 0).any():
        raise DataError(f"the bank's {Ffn.of(key)} does not name its neurons in increasing order, each once")
    return neurons.astype(np.int32)


@dataclass(frozen=True, eq=False)
class Importance:
    """The importance I_{l,i} of every neuron for a task; higher is more important.

    `numpy.asarray` gives it as float32 [L, I], I being the most neurons that a layer has, 0 beyond a layer's own.
    """

    index: NeuronIndex
    values: npt.NDArray[np.float32]
    """float32 [N], in the index's order."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("an Importance is made into a matrix by copying it")
        matrix = np.zeros((len(self.index.widths), max(self.index.widths)), dtype=np.float32)
        for layer, width in enumerate(self.index.widths):
            matrix[layer, :width] = self.values[self.index.layer(layer)]
        return np.asarray(matrix, dtype=dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """[L, I]."""
        return np.asarray(self).shape

    def bank(self, top_fraction: float) -> Bank:
        """The most important share of all N neurons, of those with a positive importance.

        So a bank can be smaller than asked for.

        Raises:
            DataError: the fraction is outside (0, 1], or no neuron has a positive importance.
        """
        top = self.top(bank_size(top_fraction, self.index.size))
        if not len(top):
            raise DataError("no neuron has a positive importance; use more examples or more heads")
        return self.index.bank(np.sort(top))

    def top(self, count: int) -> npt.NDArray[np.intp]:
        """The numbers of the `count` most important neurons, or of all with a positive importance where fewer have one.

        The most important comes first; ties go to the lower number.
        """
        top = np.argsort(-self.values, kind="stable")[:count]
        return top[self.values[top] > 0]


def bank_size(top_fraction: float, neurons: int) -> int:
    """How many of so many neurons a share is, at least 1; raises DataError for a share outside (0, 1]."""
    check_fraction(top_fraction)
    return max(1, round(top_fraction * neurons))


def check_fraction(top_fraction: float) -> None:
    """Raise DataError for a bank's share of the neurons outside (0, 1]."""
    if not 0 < top_fraction <= 1:
        raise DataError(f"top_fraction must lie in (0, 1], not {top_fraction}")


def jaccard(one: Bank, another: Bank) -> float:
    """Neurons in both banks over neurons in either; raises DataError if both are empty."""
    a, b = set(one.pairs()), set(another.pairs())
    if not a | b:
        raise DataError("two empty banks have no overlap")
    return len(a & b) / len(a | b)


def exact_groups(banks: Mapping[str, Bank]) -> dict[tuple[str, ...], Bank]:
    """The neurons that are in the banks of exactly these tasks and in no other's, by the tasks (docs/methods.md).

    Groups without neurons are left out; smaller sets of tasks come first, tasks in the order given.
    """
    owners: dict[tuple[FfnKey, int], tuple[str, ...]] = {}
    for task, bank in banks.items():
        for pair in bank.pairs():
            owners[pair] = (*owners.get(pair, ()), task)
    members: dict[tuple[str, ...], dict[FfnKey, list[int]]] = {}
    for (key, neuron), sharing in sorted(owners.items(), key=lambda owned: (_order(owned[0][0]), owned[0][1])):
        members.setdefault(sharing, {}).setdefault(key, []).append(neuron)
    position = {task: number for number, task in enumerate(banks)}
    order = sorted(members, key=lambda tasks: (len(tasks), [position[task] for task in tasks]))
    return {tasks: Bank(members[tasks]) for tasks in order}
