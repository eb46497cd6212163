"""Titles of the methods that a summary names, their meanings, and the order in which the report lists them.

A summary writes a method as `name` or `name:variant`, such as `hones_logprob:rank`.
"""

from collections.abc import Iterable

from hones_offline.attribution.methods import METHODS
from hones_offline.comparison.settings import NESTED_CHOICE
from hones_offline.comparison.study import STEERED
from hones_offline.learning.adapters import ADAPTERS
from hones_offline.learning.methods import STEERING_METHODS


def method_title(method: str) -> str:
    """The title shown: `hones_logprob:rank` becomes HONES-LP rank. A name not known here stays as it is."""
    name, colon, variant = method.partition(":")
    known = METHODS.get(name) or STEERING_METHODS.get(name) or ADAPTERS.get(name)
    title = known.title if known else {NESTED_CHOICE: "best on dev"}.get(name, name)
    return f"{title} {variant}" if colon else title


def meanings(methods: Iterable[str]) -> list[str]:
    """A sentence for each title that stands for one of these ways to choose a bank."""
    names = {method.partition(":")[0] for method in methods}
    return [f"{known.title}: {known.meaning}." for name, known in METHODS.items() if name in names]


def is_ours(method: str) -> bool:
    """Whether the method is HONES or a variant of it, not something to compare with."""
    return method.startswith("hones")


def place(method: str) -> tuple[int, str]:
    """Sort key for methods: HONES, its variants, the others in the registries' order, then unknown ones by name."""
    name, _, variant = method.partition(":")
    for methods in (list(METHODS), list(STEERED)):
        if name in methods:
            return methods.index(name), variant
    return len(METHODS), method
