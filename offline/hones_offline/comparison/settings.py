"""Settings of a comparison: the methods by name, with their variants, and how much of everything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, cast, get_args

from hones_offline.attribution import methods
from hones_offline.attribution.contrast import FLOOR, POOL_FACTOR, Contrast, check_contrast
from hones_offline.attribution.heads import HeadMetric
from hones_offline.attribution.methods import AttributionOptions
from hones_offline.data.neurons import check_fraction
from hones_offline.learning.adapters import ADAPTERS
from hones_offline.learning.choosing import FitGrid
from hones_offline.learning.factors import FitSettings
from hones_steer.errors import DataError

METHODS: tuple[str, ...] = tuple(reversed([*methods.METHODS]))
"""The methods compared by default. Variants follow a colon: "hones_logprob:contrastive+rank", "dvp:ratio"."""
STAGES = ("masking", "finding", "groups", "steer_groups", "steering", "strength", "selections")
NESTED_CHOICE = "best_on_dev"
"""The selection whose profile is best on dev, chosen anew for each task and seed."""
COMPARATORS = ("grid_search", "sparse", *ADAPTERS, NESTED_CHOICE)
"""The comparators of selections: one factor, sparsity learned with the factors, adapters of PEFT, nested choice."""
ABLATIONS = ("zero", "mean")
"""Values that a masked neuron's activation is set to: 0, or its mean over the tasks (docs/methods.md)."""


@dataclass(frozen=True)
class ComparedMethod:
    """A method's name taken apart; `parse` gives it."""

    name: str
    base: str
    """The name in `attribution.methods.METHODS`."""
    options: AttributionOptions
    """Those of attribution on one task, without what a comparison decides for all methods: heads, size, seed."""
    contrast: Contrast | None = None
    """How its banks are contrasted with other tasks, if they are."""

    @property
    def compares_tasks(self) -> bool:
        """Whether a bank depends on the importance for other tasks."""
        return self.contrast is not None or methods.METHODS[self.base].contrast is not None


_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "contrastive": {"target": "contrastive"},
    "centred": {"target": "centred"},
    "example": {"positive_part": "example"},
    "rank": {"head_weights": "rank"},
    "damage": {"by_damage": True},
    "leave_out": {"leave_out": True},
}
"""Each variant's name, and the option of attribution that it stands for."""
_CONTRASTS: tuple[str, ...] = get_args(Contrast)


@cache
def parse(name: str) -> ComparedMethod:
    """The method that a name stands for; raises DataError for one that is unknown, naming the known ones."""
    base, colon, rest = name.partition(":")
    variants = rest.split("+") if rest else []
    contrasts = [variant for variant in variants if variant in _CONTRASTS]
    taken = methods.METHODS[base].options if base in METHODS else ()
    allowed = {variant for variant, changes in _VARIANTS.items() if set(changes) <= set(taken)}
    allowed |= set(_CONTRASTS) if base != "random" else set()
    if base not in METHODS or (colon and not rest) or not set(variants) <= allowed:
        raise DataError(
            f"unknown method {name!r}; choose from {', '.join(METHODS)}; those of hones take variants after a colon, "
            f"joined by '+': {', '.join((*_VARIANTS, *_CONTRASTS))}; head_grad takes rank, damage, leave_out, max or "
            "ratio, dvp contrastive, centred, max or ratio, the others but random max or ratio"
        )
    changes = {key: value for variant in variants for key, value in _VARIANTS.get(variant, {}).items()}
    if len(changes) + len(contrasts) < len(variants) or len(contrasts) > 1:
        raise DataError(f"method {name!r} asks for two variants of the same thing; choose one")
    metric: HeadMetric = "logprob" if base in ("hones_logprob", "head_grad") else "task"
    options = AttributionOptions(method=methods.METHODS[base].single_task or base, head_metric=metric, **changes)
    return ComparedMethod(name, base, options, cast(Contrast, contrasts[0]) if contrasts else None)


def uncontrasted(name: str) -> str:
    """The name of the same method without its contrast."""
    base, _, rest = name.partition(":")
    variants = "+".join(variant for variant in rest.split("+") if variant not in _CONTRASTS)
    return f"{base}:{variants}" if variants else base


@dataclass(frozen=True)
class CompareSettings:
    """The methods that a comparison compares, on how much data and in which stages.

    Raises:
        DataError: a value is out of range, or names a method or stage that there is not.
    """

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
    measured: Sequence[str] | None = None
    """The tasks that get banks and are measured (None: all); those of the others are only compared with."""
    contrast_tasks: Sequence[str] | None = None
    """The tasks that methods with a contrast, and "ape", compare a task with (None: all others); one of them with the
    rest of them."""
    pool_factor: float = POOL_FACTOR
    """The contrast "ratio" chooses among so many times the bank's neurons."""
    floor: float = FLOOR
    """The contrast "ratio" adds this share of the importance of the pool's last neuron to that of the others."""
    ablations: Sequence[str] = ("zero",)
    """Some of `ABLATIONS`, for the stage "finding"; the other stages set neurons to 0."""
    own_drop_levels: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9)
    """The own drops at which the stage "finding" compares what methods cost bystanders."""
    reference: str | None = None
    """The method that the stage "finding" takes differences to (None: no differences)."""
    pool: int | None = None
    """Draw from the first so many discovery examples (all): heads are scored on each of them once, for all seeds."""
    top_heads: int = 30
    memory_gb: float = 4.0
    stages: Sequence[str] = ("masking", "groups", "steering", "strength")
    """Some of `STAGES`; learning factors for every group and task ("steer_groups") takes long."""
    group_seeds: int = 1
    learned_seeds: int | None = None
    """Factors are learned on the banks of the first so many seeds (all)."""
    strengths: Sequence[float] = (-1.0, 0.5, 1.0, 1.5, 2.0)
    """The learned factors' offsets times these."""
    fit: FitSettings = field(default_factory=FitSettings)
    selections: Sequence[str] = ()
    """Methods whose banks get factors in the stage "selections", each chosen on dev from the same grid."""
    comparators: Sequence[str] = COMPARATORS
    """Some of `COMPARATORS`, for the same stage; the first two are of the main method's bank and size."""
    selection_reference: str | None = None
    """The selection or comparator that the others' gains are paired with (None: the first selection)."""
    grid: FitGrid = field(default_factory=FitGrid)
    """The values that are tried on dev in that stage."""
    lora_lrs: Sequence[float] = (0.0003, 0.001, 0.003)
    """The learning rates that LoRA tries in place of the grid's, as many."""

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
        if unknown := set(self.ablations) - set(ABLATIONS):
            raise DataError(f"unknown ablations {', '.join(sorted(unknown))}; choose from {', '.join(ABLATIONS)}")
        if not self.ablations:
            raise DataError(f"ablations is empty; choose from {', '.join(ABLATIONS)}")
        for level in self.own_drop_levels:
            if not 0 < level <= 1:
                raise DataError(f"own_drop_levels must lie in (0, 1], not {level}")
        if self.measured is not None and len(set(self.measured)) < 2:
            raise DataError(f"measured must name at least two tasks, not {', '.join(self.measured) or 'none'}")
        if self.reference is not None and self.reference not in self.methods:
            raise DataError(f"reference must be one of the methods, not {self.reference!r}")
        for name in ("group_seeds", "learned_seeds"):
            if not 1 <= (getattr(self, name) or 1) <= self.seeds:
                raise DataError(f"{name} must lie between 1 and seeds, not {getattr(self, name)}")
        check_contrast("ratio", self.pool_factor, self.floor)
        self._check_selections()
        if unswept := set(self.sweep or ()) - set(self.methods):
            raise DataError(f"sweep names {', '.join(sorted(unswept))}, which is not among the methods")

    def _check_selections(self) -> None:
        for method in self.selections:
            parse(method)
        if "selections" in self.stages and not self.selections:
            raise DataError("the stage 'selections' has none to compare; name methods in selections")
        if unknown := set(self.comparators) - set(COMPARATORS):
            raise DataError(f"unknown comparators {', '.join(sorted(unknown))}; choose from {', '.join(COMPARATORS)}")
        steered = [*self.selections, *self.comparators]
        if twice := {name for name in steered if steered.count(name) > 1}:
            raise DataError(f"selections and comparators name {', '.join(sorted(twice))} twice; name each once")
        if self.selection_reference is not None and self.selection_reference not in steered:
            raise DataError(
                f"selection_reference must be one of the selections or comparators, not {self.selection_reference!r}"
            )
        if len(replace(self.grid, lrs=self.lora_lrs).lrs) != len(self.grid.lrs):
            raise DataError(
                f"lora_lrs must be as many as the grid's learning rates, {len(self.grid.lrs)}, so that LoRA has as "
                f"many trials, not {len(self.lora_lrs)}"
            )
