"""Which method's bank of a task: the names under which methods are compared, and how each finds its neurons.

A seed draws `attribution_examples` of a task's discovery examples, and every method gets the same draw. Head statistics
are taken once, of every example that may be drawn; importances are steps of the task's run folder.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hones_offline.attribution.baselines import Importance, activation_entropy, baseline
from hones_offline.attribution.heads import HeadMetric, head_scores, head_statistics, top_heads
from hones_offline.attribution.pipeline import Attribution
from hones_offline.attribution.write_in import (
    WRITE_IN,
    HeadWeights,
    PositivePart,
    Target,
    importance,
    target_directions,
    weigh,
)
from hones_offline.comparison.study import Splits
from hones_offline.data.metrics import FloatArray
from hones_offline.data.neurons import Bank, check_fraction, random_bank, select_bank
from hones_offline.data.records import naming
from hones_offline.learning.factors import FitSettings
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared
from hones_offline.running.run_folder import RunFolder, json_bytes, run_settings
from hones_steer.errors import DataError

METHODS = ("random", "ap", "ma", "ape", "dvp", "grad_act", "hones_task", "hones_logprob")
"""What is compared by default. Variants follow a colon: "hones_logprob:contrastive+rank", "dvp:centred"."""
STAGES = ("masking", "groups", "steer_groups", "steering", "strength")
Head = tuple[int, int, float]


@dataclass(frozen=True)
class Method:
    """A method's name taken apart; `parse` gives it."""

    name: str
    head_metric: HeadMetric | None = None
    target: Target = "paper"
    positive_part: PositivePart = "mean"
    head_weights: HeadWeights = "score"
    by_damage: bool = False
    """Weights divided by how much replacing the head harms all tasks."""
    leave_out: bool = False
    """Without the heads that are among the strongest of every task."""
    specific: bool = False
    """Without the neurons of the other tasks' banks of the same size; the next ones fill it up."""


_HEAD_METRICS: Mapping[str, HeadMetric] = {"hones_task": "task", "hones_logprob": "logprob"}
_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "contrastive": {"target": "contrastive"},
    "centred": {"target": "centred"},
    "example": {"positive_part": "example"},
    "rank": {"head_weights": "rank"},
    "damage": {"by_damage": True},
    "leave_out": {"leave_out": True},
    "specific": {"specific": True},
}
_ALLOWED = {"dvp": ("contrastive", "centred", "specific"), "random": ()}


@cache
def parse(name: str) -> Method:
    """What a method's name says; raises DataError for one that is unknown, naming the known ones."""
    base, _, rest = name.partition(":")
    variants = rest.split("+") if rest else []
    allowed = _ALLOWED.get(base, tuple(_VARIANTS) if base in _HEAD_METRICS else ("specific",))
    if base not in METHODS or (":" in name and not rest) or not set(variants) <= set(allowed):
        raise DataError(
            f"unknown method {name!r}; choose from {', '.join(METHODS)}; those of hones take variants after a colon, "
            f"joined by '+': {', '.join(_VARIANTS)}; dvp takes contrastive, centred or specific, the others specific"
        )
    changes = {key: value for variant in variants for key, value in _VARIANTS[variant].items()}
    if len(changes) < len(variants):
        raise DataError(f"method {name!r} asks for two variants of the same thing; choose one")
    return Method(name, head_metric=_HEAD_METRICS.get(base), **changes)


def without_variant(name: str, variant: str) -> str:
    """The name of the same method without one of its variants."""
    base, _, rest = name.partition(":")
    others = "+".join(other for other in rest.split("+") if other != variant)
    return f"{base}:{others}" if others else base


@dataclass(frozen=True)
class CompareSettings:
    """What is compared, and how much of it."""

    methods: Sequence[str] = METHODS
    main: str = "hones_task"
    """The method whose banks are grouped and steered, and that random banks have their sizes per layer from."""
    fractions: Sequence[float] = (0.01,)
    fraction: float = 0.01
    """One of `fractions`, for everything but the masking table."""
    sweep: Sequence[str] | None = None
    """The methods that are masked at every one of `fractions`; the others only at `fraction` (None: all methods)."""
    seeds: int = 5
    attribution_examples: int = 128
    """Discovery examples that a seed draws."""
    pool: int | None = None
    """Draw from the first so many discovery examples (all): heads are scored on each of them once, for all seeds."""
    top_heads: int = 30
    memory_gb: float = 4.0
    stages: Sequence[str] = ("masking", "groups", "steering", "strength")
    """Of `STAGES`; learning factors for every group and task ("steer_groups") takes long."""
    group_seeds: int = 1
    learned_seeds: int | None = None
    """Factors are learned on the banks of the first so many seeds (all)."""
    strengths: Sequence[float] = (-1.0, 0.5, 1.0, 1.5, 2.0)
    """The learned factors' offsets times these."""
    fit: FitSettings = field(default_factory=FitSettings)

    def __post_init__(self) -> None:
        for method in (*self.methods, self.main):
            parse(method)
        for fraction in self.fractions:
            check_fraction(fraction)
        for name in ("seeds", "attribution_examples", "top_heads"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.main not in self.methods or self.main == "random":
            raise DataError(f"main must be one of the methods other than random, not {self.main!r}")
        if self.fraction not in self.fractions:
            raise DataError(f"fraction must be one of the fractions, not {self.fraction}")
        if unknown := set(self.stages) - set(STAGES):
            raise DataError(f"unknown stages {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
        for name in ("group_seeds", "learned_seeds"):
            if not 1 <= (getattr(self, name) or 1) <= self.seeds:
                raise DataError(f"{name} must lie between 1 and seeds, not {getattr(self, name)}")
        if unswept := set(self.sweep or ()) - set(self.methods):
            raise DataError(f"sweep names {', '.join(sorted(unswept))}, which is not among the methods")


class Finder:
    """Banks of every task, method, size and seed.

    Raises:
        DataError: there are so few discovery examples that all seeds would draw the same ones.
    """

    def __init__(self, tasks: Mapping[str, Splits], settings: CompareSettings, *, progress: bool = False) -> None:
        self.tasks, self.settings, self.progress = tasks, settings, progress
        self.pools = {task: s.discovery.first(settings.pool) for task, s in tasks.items()}
        for task, pool in self.pools.items():
            if settings.seeds > 1 and len(pool) <= settings.attribution_examples:
                raise DataError(
                    f"task {task!r} has {len(pool)} examples to draw from, so that each seed would draw the same; set "
                    "attribution_examples lower or give more discovery examples"
                )
        self.statistics = cache(self._statistics)
        self.importance = cache(self._importance)

    def drawn(self, task: str, seed: int) -> list[int]:
        """The numbers of the pool's examples that a seed draws."""
        order = np.random.default_rng(seed).permutation(len(self.pools[task]))
        chosen: list[int] = order[: self.settings.attribution_examples].tolist()
        return chosen

    def examples(self, task: str, seed: int) -> Prepared:
        """The examples that a seed draws."""
        return self.pools[task].only(self.drawn(task, seed))

    def _statistics(self, task: str, metric: HeadMetric) -> tuple[FloatArray, FloatArray]:
        """`head_statistics` of the whole pool."""
        pool, splits = self.pools[task], self.tasks[task]
        settings = {"stage": "heads", **run_settings(pool), "head_metric": metric, "batch_size": splits.batch_size}
        settings["memory_gb"] = self.settings.memory_gb
        run = RunFolder(splits.path / f"heads-{metric}-{len(pool)}", settings)
        execution = Execution(splits.batch_size, self.settings.memory_gb, run=run, progress=self.progress)
        return head_statistics(pool, metric, execution)

    def scores(self, task: str, metric: HeadMetric, seed: int) -> tuple[float, npt.NDArray[np.float32]]:
        """P(θ) and S(h), [L, H], on the examples that a seed draws."""
        base, replaced = self.statistics(task, metric)
        items = self.drawn(task, seed)
        if metric == "logprob":  # items are (prompt, answer) pairs there
            counts = [len(self.pools[task].task.answers(example)) for example in self.pools[task].examples]
            firsts = np.cumsum([0, *counts])
            items = [pair for i in items for pair in range(firsts[i], firsts[i + 1])]
        return head_scores(self.pools[task], metric, base[items], replaced[:, :, items])

    def heads(self, task: str, method: Method, seed: int) -> list[Head]:
        """The heads that guide the importance, with their weights."""
        metric, count = method.head_metric, self.settings.top_heads
        assert metric is not None
        _, own = self.scores(task, metric, seed)
        if method.leave_out:
            strongest = [top_heads(self.scores(other, metric, seed)[1], count) for other in self.tasks]
            for layer, head in set.intersection(*({head[:2] for head in heads} for heads in strongest)):
                own[layer, head] = 0
        heads = weigh(top_heads(own, count), method.head_weights)
        if method.by_damage:
            harm = np.mean([_relative(self.scores(other, metric, seed)[1]) for other in self.tasks], axis=0)
            heads = [(layer, head, float(weight / harm[layer, head])) for layer, head, weight in heads]
        return heads

    def _importance(self, task: str, name: str, seed: int) -> Importance:
        """[L, I], by any method but "random"; a step of the task's run folder, named by all that decides it."""
        method, splits = parse(name), self.tasks[task]
        if name == "ape":
            return activation_entropy({other: self.importance(other, "ap", seed) for other in self.tasks})[task]
        with naming(f"task {task!r}, method {name!r}, seed {seed}"):
            heads = self.heads(task, method, seed) if method.head_metric else []
            examples = self.examples(task, seed)

            def compute() -> dict[str, Importance]:
                limits: dict[str, Any] = {"batch_size": splits.batch_size}
                if not heads:
                    kind: Any = name.partition(":")[0]
                    return {"importance": baseline(examples, kind, target=method.target, **limits)}
                directions = target_directions(examples, method.target)
                execution, part = Execution(splits.batch_size, self.settings.memory_gb), method.positive_part
                return {"importance": importance(examples, directions, heads, execution, positive_part=part)}

            decides = [WRITE_IN, name, heads, [example.id for example in examples.examples]]
            digest = hashlib.sha256(json_bytes(decides)).hexdigest()[:16]
            return splits.run.arrays(f"importance-{digest}", compute)["importance"]

    def bank(self, task: str, name: str, fraction: float, seed: int) -> Bank:
        """A method's bank; a random one has as many neurons in each layer as the main method's."""
        if name == "random":
            width = self.tasks[task].discovery.decoder.layout.intermediate_size
            return random_bank(self.bank(task, self.settings.main, fraction, seed), width, seed)
        with naming(f"task {task!r}, method {name!r}, seed {seed}"):
            if not parse(name).specific:
                return select_bank(self.importance(task, name, seed), fraction)
            shared = without_variant(name, "specific")
            others = [self.bank(other, shared, fraction, seed) for other in self.tasks if other != task]
            return select_bank(self.importance(task, shared, seed), fraction, others)

    def attribution(self, task: str, name: str, seed: int) -> Attribution:
        """What was found by a method with heads; the bank has the main size."""
        method, examples = parse(name), self.examples(task, seed)
        if method.head_metric is None:
            raise DataError(f"method {name!r} has no heads; its banks come from `bank`")
        base, scores = self.scores(task, method.head_metric, seed)
        bank = self.bank(task, name, self.settings.fraction, seed)
        heads, values = self.heads(task, method, seed), self.importance(task, name, seed)
        return Attribution(scores, values, bank, heads, base, len(examples), dict(examples.failures))


def _relative(scores: npt.NDArray[np.float32]) -> FloatArray:
    """Scores as shares of the highest, those below zero as zero."""
    positive = scores.astype(np.float64).clip(min=0)
    shares: FloatArray = positive / (positive.max() or 1.0)
    return shares
