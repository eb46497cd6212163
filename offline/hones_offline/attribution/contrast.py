"""Contrast over tasks: the neurons that matter to one task and not to the others (docs/methods.md).

Any method's importance can be contrasted, with that of any number of other tasks by the same method on the same model.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from hones_offline.data.metrics import FloatArray
from hones_offline.data.neurons import Importance, bank_size
from hones_offline.data.records import naming
from hones_steer.errors import DataError

Contrast = Literal["max", "ratio"]
"""By how much, or how many times, a neuron matters more to the task than to the other that needs it most."""

POOL_FACTOR = 4.0
"""With "ratio", the bank is chosen among so many times its neurons: the task's most important ones."""
FLOOR = 0.05
"""With "ratio", what is added to the others' importance, as a share of that of the pool's last neuron."""
_UNIT_SHARE = 0.01


def unit(importance: Importance) -> FloatArray:
    """Importance [N] on a scale that tasks share: its positive part over the mean of the task's own top 1%.

    Raises:
        DataError: no neuron has a positive importance.
    """
    positive = importance.values.astype(np.float64).clip(min=0)
    if not positive.any():
        raise DataError("no neuron has a positive importance; use more examples or more heads")
    top = np.sort(positive)[-bank_size(_UNIT_SHARE, len(positive)) :]
    shared: FloatArray = positive / top.mean()
    return shared


def contrasted(
    own: Importance,
    others: Sequence[Importance],
    contrast: Contrast,
    top_fraction: float,
    *,
    pool_factor: float = POOL_FACTOR,
    floor: float = FLOOR,
) -> Importance:
    """The importance whose bank of `top_fraction` is the task's contrasted bank, positive only where a neuron can be.

    "max" is the neuron's unit importance less the highest of the other tasks. "ratio" is the quotient of the two, with
    a floor under the others', among the `pool_factor` times k neurons that are the task's most important ones (k is the
    bank's size), and 0 for all others.

    Args:
        own: the task's importance.
        others: those of other tasks, at least one, by the same method on the same model.
        contrast: "max" or "ratio".
        top_fraction: the bank's share of all neurons.
        pool_factor: the pool's size over the bank's, 1 or more.
        floor: what is added to the others' unit importance, as a share of that of the pool's last neuron.

    Raises:
        DataError: there is no other task, a value is out of range, an importance is positive nowhere or is another
            model's, or no neuron is more important to this task than to the others.
    """
    check_contrast(contrast, pool_factor, floor)
    if not others:
        raise DataError("a contrast compares tasks; give the importance of at least one other task")
    if any(other.index != own.index for other in others):
        raise DataError("the importance to contrast with has other neurons; find it on the same model")
    mine, theirs = unit(own), np.zeros(own.index.size)
    for number, other in enumerate(others, start=1):
        with naming(f"task {number} to contrast with"):
            theirs = np.maximum(theirs, unit(other))
    if contrast == "max":
        values = mine - theirs
        if not (values > 0).any():
            raise DataError("no neuron is more important to this task than to the others; choose contrast 'ratio'")
    else:
        pool = own.top(round(pool_factor * bank_size(top_fraction, own.index.size)))
        values = np.zeros(own.index.size)
        values[pool] = mine[pool] / (theirs[pool] + floor * mine[pool[-1]])
    # Float32 has no number for the quotient of a large importance and a vanishing one.
    return Importance(own.index, values.clip(max=np.finfo(np.float32).max).astype(np.float32))


def check_contrast(contrast: str, pool_factor: float = POOL_FACTOR, floor: float = FLOOR) -> None:
    """Raise DataError for an unknown contrast, a pool smaller than the bank, or a floor that is not positive."""
    if contrast not in get_args(Contrast):
        raise DataError(f"contrast must be one of {', '.join(get_args(Contrast))}, not {contrast!r}")
    if not 1 <= pool_factor < np.inf:
        raise DataError(f"pool_factor must be 1 or more, not {pool_factor}")
    if not 0 < floor < np.inf:
        raise DataError(f"floor must be positive, not {floor}")
