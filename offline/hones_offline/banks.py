"""Neuron banks: which FFN neurons belong to a task (paper equation for the top 1%; design 2.3, 2.7)."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from hones_steer.errors import DataError

Bank = Mapping[int, npt.NDArray[np.int32]]
"""{decoder layer: strictly increasing neuron indices, int32}; layers without neurons are absent."""


def select_bank(importance: npt.NDArray[np.float32], top_fraction: float) -> Bank:
    """The most important share of all L·I neurons, globally; ties go to the lower layer, then the lower index.

    Only neurons with positive importance are taken, so a bank can be smaller than asked for.

    Raises:
        DataError: the fraction is outside (0, 1], or no neuron has a positive importance.
    """
    if not 0 < top_fraction <= 1:
        raise DataError(f"top_fraction must lie in (0, 1], not {top_fraction}")
    flat = importance.reshape(-1)
    count = max(1, round(top_fraction * flat.size))
    top = np.argsort(-flat, kind="stable")[:count]
    top = np.sort(top[flat[top] > 0])
    if not len(top):
        raise DataError("no neuron has a positive importance; use more examples or more heads")
    layers, neurons = np.divmod(top, importance.shape[1])
    return {int(layer): neurons[layers == layer].astype(np.int32) for layer in np.unique(layers)}


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
