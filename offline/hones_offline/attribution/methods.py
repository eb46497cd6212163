"""The attribution methods by name, and the options they take. docs/methods.md has the definitions.

A method is one entry of `METHODS`: commands, comparisons and reports take their lists, titles and checks from there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

from torch import Tensor

from hones_offline.attribution.baselines import (
    activation_entropy,
    activation_probability,
    direct_write_in,
    gradient_activation,
    mean_activation,
    random_importance,
    require_gates,
)
from hones_offline.attribution.gradients import absolute_gradient, fisher, gradient, head_gradient, head_gradient_rows
from hones_offline.attribution.heads import HeadMetric, HeadSearch, HeadWeights, WeightedHead
from hones_offline.attribution.write_in import (
    PositivePart,
    Target,
    head_guided_importance,
    require_write_in,
)
from hones_offline.data.neurons import Importance, check_fraction
from hones_offline.running.backward import rows_at_once
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared
from hones_offline.running.run_folder import check_seed
from hones_steer.errors import DataError


@dataclass(frozen=True)
class AttributionOptions:
    """The method that finds a task's neurons, and all that decides its result; the defaults of "hones" are the paper's.

    Raises:
        DataError: a value is out of range, or the method does not take the option.
    """

    method: str = "fisher"
    """One of `SINGLE_TASK_METHODS`."""
    head_metric: HeadMetric = "task"
    """The utility that heads are scored by: the task's metric, or the mean log-probability of the answers."""
    top_heads: int = 30
    top_fraction: float = 0.01
    """The bank's share of all neurons."""
    target: Target = "paper"
    positive_part: PositivePart = "mean"
    head_weights: HeadWeights = "score"
    heads: HeadSearch = "exact"
    error: float = 0.05
    """With `heads="race"`, the probability that it chooses other heads than "exact" does."""
    margin: float = 1.5
    """With `heads="patch"`, how many heads more than `top_heads` are run, as a share of it."""
    seed: int = 3407
    """Shuffles the examples before they are batched, and draws the importances of "random"."""
    leave_out: bool = False
    """Without the heads that are among the strongest of every task."""
    by_damage: bool = False
    """Weights divided by how much replacing the head harms all tasks."""

    def __post_init__(self) -> None:
        choices: dict[str, Sequence[str]] = {"method": SINGLE_TASK_METHODS, "target": get_args(Target)}
        choices |= {"positive_part": get_args(PositivePart), "head_weights": get_args(HeadWeights)}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise DataError(f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}")
        if self.top_heads < 1:
            raise DataError(f"top_heads must be at least 1, not {self.top_heads}")
        check_fraction(self.top_fraction)
        for name, values in {"head_metric": get_args(HeadMetric), "heads": get_args(HeadSearch)}.items():
            if getattr(self, name) not in values:
                raise DataError(f"{name} must be {' or '.join(map(repr, values))}, not {getattr(self, name)!r}")
        if not 0 < self.error < 1:
            raise DataError(f"error is a probability between 0 and 1, not {self.error}")
        if not 0 <= self.margin < math.inf:
            raise DataError(f"margin is a share of top_heads, zero or more, not {self.margin}")
        check_seed(self.seed)
        for name in ("heads", "top_heads"):
            value = getattr(self, name)
            if value != getattr(type(self), name) and not self.entry.guided:
                raise DataError(
                    f"method {self.method!r} scores no heads; leave {name}={value!r} out, or choose 'hones'"
                )
        for name in ("target", "positive_part", "head_weights", "leave_out", "by_damage"):
            if getattr(self, name) != getattr(type(self), name) and name not in self.entry.options:
                raise DataError(f"method {self.method!r} takes no {name}; leave it out")

    @property
    def method_options(self) -> dict[str, Any]:
        """The options that the method takes besides those of every method, by name."""
        return {name: getattr(self, name) for name in self.entry.options}

    @property
    def comparable(self) -> dict[str, Any]:
        """Everything that two importances must have in common to be compared over tasks: the method and its options."""
        guided = {"head_metric": self.head_metric, "top_heads": self.top_heads} if self.entry.guided else {}
        return {"method": self.method, **guided, **self.method_options}

    @property
    def needs_all_tasks(self) -> bool:
        """Whether the heads are chosen or weighed by all tasks' scores."""
        return self.leave_out or self.by_damage

    @property
    def name(self) -> str:
        """The method's name in `METHODS`."""
        return f"hones_{self.head_metric}" if self.method == "hones" else self.method

    @property
    def entry(self) -> "AttributionMethod":
        """The entry of `METHODS` that is run."""
        return METHODS[self.name]


Compute = Callable[[Prepared, Tensor | None, Sequence[WeightedHead], AttributionOptions, Execution], Importance]
"""(examples, target directions [examples, hidden] or None, guiding heads, options, execution) -> importance."""


@dataclass(frozen=True)
class AttributionMethod:
    """A way of finding a task's neurons: its names for readers, and the function that gives their importance."""

    title: str
    """The name in tables."""
    meaning: str
    """A few words on it."""
    importance: Compute
    options: tuple[str, ...] = ()
    """Fields of `AttributionOptions` that it takes, besides those of every method."""
    guided: bool = False
    """Whether heads guide it: their scores are found first."""
    check: Callable[[Prepared, Execution], object] = lambda _prepared, _execution: None
    """Raises, before any work, if the model or the memory is not what it needs."""
    contrast: Callable[[Mapping[str, Importance]], Mapping[str, Importance]] | None = None
    """For a method that compares tasks: the function from every task's importance by `single_task` to its own."""
    single_task: str = ""
    """The name in `AttributionOptions` of the method that runs on one task, where it is not the same."""

    @property
    def directed(self) -> bool:
        """Whether it looks towards the answers' directions."""
        return "target" in self.options


def _head_guided(
    prepared: Prepared,
    directions: Tensor | None,
    heads: Sequence[WeightedHead],
    options: AttributionOptions,
    execution: Execution,
) -> Importance:
    assert directions is not None
    return head_guided_importance(prepared, directions, heads, execution, positive_part=options.positive_part)


def _head_gradient(
    prepared: Prepared, _directions: object, heads: Sequence[WeightedHead], _options: object, execution: Execution
) -> Importance:
    return head_gradient(prepared, heads, execution)


def _direct(
    prepared: Prepared, directions: Tensor | None, _heads: object, _options: object, execution: Execution
) -> Importance:
    assert directions is not None
    return direct_write_in(prepared, directions, execution)


def _undirected(function: Callable[[Prepared, Execution], Importance]) -> Compute:
    """A method that needs nothing but the examples."""
    return lambda prepared, _directions, _heads, _options, execution: function(prepared, execution)


def _hones(title: str, meaning: str) -> AttributionMethod:
    options = ("target", "positive_part", "head_weights", "leave_out", "by_damage")
    return AttributionMethod(
        title, meaning, _head_guided, options, guided=True, check=require_write_in, single_task="hones"
    )


METHODS: Mapping[str, AttributionMethod] = MappingProxyType(
    {
        "hones_task": _hones("HONES", "heads scored by the task's metric"),
        "hones_logprob": _hones("HONES-LP", "heads scored by the answers' log-probability"),
        "head_grad": AttributionMethod(
            "head × grad",
            "the part of grad_all that the task's heads account for",
            _head_gradient,
            options=("head_weights", "leave_out", "by_damage"),
            guided=True,
            check=head_gradient_rows,
        ),
        "dvp": AttributionMethod(
            "DVP",
            "direct value projection: what a neuron writes towards the answer, without heads",
            _direct,
            options=("target",),
            check=require_write_in,
        ),
        "fisher": AttributionMethod(
            "Fisher",
            "mean square of the gradient by the neuron's factor, over all positions",
            _undirected(fisher),
            check=rows_at_once,
        ),
        "grad_all": AttributionMethod(
            "grad (all positions)",
            "gradient of the answers' log-probability by the neuron's factor, over all positions",
            _undirected(gradient),
            check=rows_at_once,
        ),
        "grad_abs": AttributionMethod(
            "|grad|",
            "absolute value of grad_all",
            _undirected(absolute_gradient),
            check=rows_at_once,
        ),
        "grad_act": AttributionMethod(
            "grad × act",
            "gradient of the answers' log-probability times activation, at the last prompt token",
            _undirected(gradient_activation),
            check=rows_at_once,
        ),
        "ma": AttributionMethod("MA", "mean activation", _undirected(mean_activation)),
        "ap": AttributionMethod(
            "AP",
            "activation probability: the share of tokens at which a neuron is active",
            _undirected(activation_probability),
            check=require_gates,
        ),
        "ape": AttributionMethod(
            "APE",
            "entropy of the activation probability across tasks",
            _undirected(activation_probability),
            check=require_gates,
            contrast=activation_entropy,
            single_task="ap",
        ),
        "random": AttributionMethod(
            "random",
            "neurons drawn at random, as many in each layer",
            lambda prepared, _directions, _heads, options, _execution: random_importance(prepared, options.seed),
        ),
    }
)
"""Every method, in the order in which reports show them."""

SINGLE_TASK_METHODS = (
    "hones",
    *(name for name, method in METHODS.items() if not method.single_task),
)
"""The methods that find one task's neurons without another task; "hones" is that of its head metric."""
