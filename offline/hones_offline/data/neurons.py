"""The neurons of a decoder's FFNs: how they are numbered, how important they are for a task, and banks of them.

No other module knows how layers and their widths make up the set of all neurons, so that FFNs of another kind are a
change in this one. docs/methods.md has the definitions.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hones_steer.errors import DataError
from hones_steer.layout import Layout


@dataclass(frozen=True)
class NeuronIndex:
    """All N FFN neurons of a decoder, numbered layer after layer from 0.

    A vector over all neurons is [N]; `vector[..., index.layer(l)]` is layer l's part of it, [..., I].
    """

    widths: tuple[int, ...]
    """I of each layer, the number of its FFN's neurons; 0 for a layer without an FFN."""

    @classmethod
    def of(cls, layout: Layout) -> "NeuronIndex":
        """The neurons of a model."""
        return cls(tuple(layer.width for layer in layout.layers))

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """The number of each layer's first neuron, and N."""
        return (0, *np.cumsum(self.widths).tolist())

    @property
    def size(self) -> int:
        """N, the number of neurons."""
        return self._starts[-1]

    def layer(self, layer: int) -> slice:
        """The numbers of a layer's neurons."""
        return slice(self._starts[layer], self._starts[layer + 1])

    def bank(self, numbers: npt.NDArray[np.intp]) -> "Bank":
        """The bank of the neurons with these numbers, ascending."""
        cuts = np.searchsorted(numbers, self._starts)
        return Bank({layer: numbers[i:j] - self._starts[layer] for layer, (i, j) in enumerate(pairwise(cuts))})


class Bank(Mapping[int, npt.NDArray[np.int32]]):
    """A set of neurons: {decoder layer: strictly increasing neuron indices, int32}; layers without neurons are absent.

    Raises:
        DataError: a layer's neurons are no integers, or not in increasing order, each once.
    """

    def __init__(self, layers: Mapping[int, npt.NDArray[Any] | Sequence[int]]) -> None:
        self._layers = {
            layer: _indices(layer, np.asarray(neurons)) for layer, neurons in layers.items() if len(neurons)
        }

    def __getitem__(self, layer: int) -> npt.NDArray[np.int32]:
        return self._layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

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
        for layer in sorted(self):
            digest.update(f"{layer}:{self[layer].tolist()};".encode())
        return digest.hexdigest()[:16]

    def pairs(self) -> list[tuple[int, int]]:
        """(layer, neuron) of every neuron."""
        return [(layer, neuron) for layer, neurons in self.items() for neuron in neurons.tolist()]

    def split(self, values: npt.NDArray[Any]) -> dict[int, npt.NDArray[Any]]:
        """A vector [size], one value for each neuron in the bank's order, as {layer: [neurons]}."""
        cuts = np.cumsum([len(neurons) for neurons in self.values()])[:-1]
        return dict(zip(self, np.split(values, cuts), strict=True))

    def only(self, kept: npt.NDArray[np.bool_]) -> "Bank":
        """The neurons that are `kept`, bool [size] in the bank's order."""
        return Bank({layer: self[layer][part] for layer, part in self.split(kept).items()})

    def to_json(self) -> dict[str, list[int]]:
        """The bank as JSON files hold it."""
        return {str(layer): neurons.tolist() for layer, neurons in self.items()}

    def random(self, index: NeuronIndex, seed: int) -> "Bank":
        """A random bank with as many neurons in each layer, drawn from all of the layer's neurons."""
        rng = np.random.default_rng(seed)
        return Bank(
            {
                layer: np.sort(rng.choice(index.widths[layer], len(neurons), replace=False))
                for layer, neurons in self.items()
            }
        )

    def check(self, index: NeuronIndex) -> None:
        """Raise DataError if the bank is empty, or names layers or neurons that the model does not have."""
        if not self:
            raise DataError("the bank is empty; there is nothing to learn or mask")
        for layer, neurons in self.items():
            if not 0 <= layer < len(index.widths):
                raise DataError(
                    f"the bank names layer {layer}, but the model has {len(index.widths)}; "
                    "use a bank made for this model"
                )
            if neurons[0] < 0 or neurons[-1] >= index.widths[layer]:
                raise DataError(
                    f"the bank's layer {layer} names neurons outside [0, {index.widths[layer]}), the model's width; "
                    "use a bank made for this model"
                )


def _indices(layer: int, neurons: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    if neurons.dtype.kind not in "iu" or int(neurons.max()) > np.iinfo(np.int32).max:
        raise DataError(f"the bank's layer {layer} holds {neurons.dtype} {neurons.max()}; give neuron indices")
    if (np.diff(neurons.astype(np.int64)) <= 0).any():
        raise DataError(f"the bank's layer {layer} does not name its neurons in increasing order, each once")
    return neurons.astype(np.int32)


@dataclass(frozen=True, eq=False)
class Importance:
    """The importance I_{l,i} of every neuron for a task; higher is more important.

    `numpy.asarray` gives it as float32 [L, I], 0 for a layer without an FFN.
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

        The most important comes first; ties go to the lower layer, then to the lower neuron.
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
    owners: dict[tuple[int, int], tuple[str, ...]] = {}
    for task, bank in banks.items():
        for pair in bank.pairs():
            owners[pair] = (*owners.get(pair, ()), task)
    members: dict[tuple[str, ...], dict[int, list[int]]] = {}
    for (layer, neuron), sharing in sorted(owners.items()):
        members.setdefault(sharing, {}).setdefault(layer, []).append(neuron)
    position = {task: number for number, task in enumerate(banks)}
    order = sorted(members, key=lambda tasks: (len(tasks), [position[task] for task in tasks]))
    return {tasks: Bank(members[tasks]) for tasks in order}
