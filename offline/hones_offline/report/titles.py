"""Titles of the methods that a summary names, their meanings, and the order in which the report lists them.

A summary writes a method as `name` or `name:variant`, such as `hones_logprob:rank`.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Described(NamedTuple):
    """A method's title and, where the title needs one, its explanation."""

    title: str
    meaning: str = ""


ATTRIBUTION = {
    "hones_task": Described("HONES", "heads scored by the task's metric"),
    "hones_logprob": Described("HONES-LP", "heads scored by the answers' log-probability"),
    "dvp": Described("DVP", "direct value projection: what a neuron writes towards the answer, without heads"),
    "grad_act": Described("grad × act", "gradient of the answers' log-probability times activation"),
    "ma": Described("MA", "mean activation"),
    "ap": Described("AP", "activation probability: how often a neuron is active"),
    "ape": Described("APE", "entropy of the activation probability across tasks"),
    "random": Described("random", "neurons drawn at random, as many in each layer"),
}
"""Methods that choose a bank, in the order shown."""
STEERING = {
    "base": Described("base"),
    "fixed_amp": Described("fixed factor"),
    "grid_search": Described("grid search"),
    "random_neurons": Described("random neurons"),
    "hones_no_kl": Described("HONES, no KL"),
    "hones": Described("HONES"),
}
"""HONES and its steering baselines, in the order shown."""


def method_title(method: str) -> str:
    """The title shown: `hones_logprob:rank` becomes HONES-LP rank. A name not known here stays as it is."""
    name, colon, variant = method.partition(":")
    known = ATTRIBUTION.get(name) or STEERING.get(name)
    title = known.title if known else name
    return f"{title} {variant}" if colon else title


def meanings(methods: Iterable[str]) -> list[str]:
    """A sentence for each title that stands for one of these ways to choose a bank."""
    names = {method.partition(":")[0] for method in methods}
    return [f"{known.title}: {known.meaning}." for name, known in ATTRIBUTION.items() if name in names]


def is_ours(method: str) -> bool:
    """Whether the method is HONES or a variant of it, not something to compare with."""
    return method.startswith("hones")


def place(method: str) -> tuple[int, str]:
    """Sort key for methods: HONES, its variants, the others in the order above, then unknown ones by name."""
    name, _, variant = method.partition(":")
    for methods in (list(ATTRIBUTION), list(STEERING)):
        if name in methods:
            return methods.index(name), variant
    return len(ATTRIBUTION), method
