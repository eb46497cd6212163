"""Neuron banks: which FFN neurons belong to a task (paper equation for the top 1%; design 2.3, 2.7)."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from hones_steer.errors import DataError
from hones_steer.layout import Layout

Bank = Mapping[int, npt.NDArray[np.int32]]
"""{decoder layer: strictly increasing neuron indices, int32}; layers without neurons are absent."""


def select_bank(importance: npt.NDArray[np.float32], top_fraction: float, without: Sequence[Bank] = ()) -> Bank:
    """The most important share of all L·I neurons, globally; ties go to the lower layer, then the lower index.

    Only neurons with positive importance are taken, so a bank can be smaller than asked for. Neurons of the banks
    `without` are passed over; the next ones take their place.

    Raises:
        DataError: the fraction is outside (0, 1], or no neuron has a positive importance.
    """
    check_fraction(top_fraction)
    importance = importance.copy()
    for bank in without:
        for layer, neurons in bank.items():
            importance[layer, neurons] = 0
    flat = importance.reshape(-1)
    count = max(1, round(top_fraction * flat.size))
    top = np.argsort(-flat, kind="stable")[:count]
    top = np.sort(top[flat[top] > 0])
    if not len(top):
        raise DataError("no neuron has a positive importance; use more examples or more heads")
    layers, neurons = np.divmod(top, importance.shape[1])
    return {int(layer): neurons[layers == layer].astype(np.int32) for layer in np.unique(layers)}


def check_fraction(top_fraction: float) -> None:
    """Raise DataError for a bank's share of the neurons outside (0, 1]."""
    if not 0 < top_fraction <= 1:
        raise DataError(f"top_fraction must lie in (0, 1], not {top_fraction}")


def check_bank(bank: Bank, layout: Layout) -> None:
    """Raise DataError for a bank that is empty or that names layers or neurons the model does not have."""
    if not bank_size(bank):
        raise DataError("the bank is empty; there is nothing to learn or mask")
    for layer, neurons in bank.items():
        if not 0 <= layer < len(layout.layers):
            raise DataError(
                f"the bank names layer {layer}, but the model has {len(layout.layers)}; use a bank made for this model"
            )
        if len(neurons) and not (neurons[0] >= 0 and neurons[-1] < layout.intermediate_size):
            raise DataError(
                f"the bank's layer {layer} names neurons outside [0, {layout.intermediate_size}), the model's width; "
                "use a bank made for this model"
            )
        if (np.diff(neurons) <= 0).any():
            raise DataError(f"the bank's layer {layer} does not name its neurons in increasing order, each once")


def random_bank(bank: Bank, intermediate_size: int, seed: int) -> Bank:
    """A random bank with as many neurons in each layer as `bank`, drawn from all of the layer's neurons."""
    rng = np.random.default_rng(seed)
    return {
        layer: np.sort(rng.choice(intermediate_size, len(neurons), replace=False)).astype(np.int32)
        for layer, neurons in bank.items()
    }


def bank_size(bank: Bank) -> int:
    """How many neurons a bank holds."""
    return sum(len(neurons) for neurons in bank.values())


def bank_digest(bank: Bank) -> str:
    """16 hex digits that stand for a bank's neurons."""
    digest = hashlib.sha256()
    for layer in sorted(bank):
        if len(bank[layer]):
            digest.update(f"{layer}:{bank[layer].tolist()};".encode())
    return digest.hexdigest()[:16]


def jaccard(a: Bank, b: Bank) -> float:
    """Neurons in both banks over neurons in either; raises DataError if both are empty."""
    one, other = set(_neurons(a)), set(_neurons(b))
    if not one | other:
        raise DataError("two empty banks have no overlap")
    return len(one & other) / len(one | other)


def exact_groups(banks: Mapping[str, Bank]) -> dict[tuple[str, ...], Bank]:
    """The neurons that are in the banks of exactly these tasks and in no other's, by the tasks (design 2.4).

    Groups without neurons are left out; smaller sets of tasks come first, tasks in the order given.
    """
    owners: dict[tuple[int, int], tuple[str, ...]] = {}
    for task, bank in banks.items():
        for neuron in _neurons(bank):
            owners[neuron] = (*owners.get(neuron, ()), task)
    members: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for neuron, tasks in sorted(owners.items()):
        members.setdefault(tasks, []).append(neuron)
    position = {task: number for number, task in enumerate(banks)}
    order = sorted(members, key=lambda tasks: (len(tasks), [position[task] for task in tasks]))
    return {tasks: _bank(members[tasks]) for tasks in order}


def _neurons(bank: Bank) -> Iterable[tuple[int, int]]:
    return ((layer, neuron) for layer, neurons in bank.items() for neuron in neurons.tolist())


def _bank(neurons: Iterable[tuple[int, int]]) -> Bank:
    """A bank from (layer, neuron) in increasing order."""
    layers: dict[int, list[int]] = {}
    for layer, neuron in neurons:
        layers.setdefault(layer, []).append(neuron)
    return {layer: np.array(of_layer, dtype=np.int32) for layer, of_layer in layers.items()}
