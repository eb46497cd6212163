"""Titles of the methods that a summary names, their meanings, and the order in which the report lists them.

A summary writes a method as `name` or `name:variant`, such as `hones_logprob:rank`.
"""

from collections.abc import Iterable

from hones_offline.attribution.methods import METHODS, AttributionOptions
from hones_offline.comparison.settings import NESTED_CHOICE
from hones_offline.comparison.steering import STEERED
from hones_offline.learning.adapters import ADAPTERS
from hones_offline.learning.methods import STEERING_METHODS

UNSTEERED = ("base", "asked")
_OTHERS = {NESTED_CHOICE: "best on dev", "asked": "asked in words"}
"""Titles of what is in no registry."""


def method_title(method: str) -> str:
    """The title shown: `hones_logprob:rank` becomes HONES-LP rank. A name not known here stays as it is."""
    name, colon, variant = method.partition(":")
    known = METHODS.get(name) or STEERING_METHODS.get(name) or ADAPTERS.get(name)
    title = known.title if known else _OTHERS.get(name, name)
    return f"{title} {variant}" if colon else title


def meanings(methods: Iterable[str]) -> list[str]:
    """A sentence for each title that stands for one of these ways to choose a bank."""
    names = {method.partition(":")[0] for method in methods}
    return [f"{known.title}: {known.meaning}." for name, known in METHODS.items() if name in names]


def is_ours(method: str) -> bool:
    """Whether the method is the one that this package takes unless told otherwise, or a variant of it."""
    return method.partition(":")[0] == AttributionOptions.method


def place(method: str) -> tuple[int, str]:
    """Sort key: what is not steered, methods in the order of attribution's registry or steering's, others by name."""
    name, _, variant = method.partition(":")
    if name in UNSTEERED:
        return UNSTEERED.index(name) - len(UNSTEERED), variant
    for methods in (list(METHODS), list(STEERED)):
        if name in methods:
            return methods.index(name), variant
    return len(METHODS), method
