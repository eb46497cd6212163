"""Everything that a search tries, and in which order; docs/methods.md, "The search", has the rule."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from hones_offline.attribution import methods
from hones_offline.comparison.settings import parse
from hones_offline.data.neurons import check_fraction
from hones_offline.learning.choosing import FitGrid
from hones_offline.learning.factors import FitSettings
from hones_steer.errors import DataError


@dataclass(frozen=True)
class Trial:
    """One bank and one learning rate: factors are learned, and epochs and strength chosen on dev."""

    selection: str
    size: float
    """The bank's share of all neurons."""
    lr: float


@dataclass(frozen=True)
class SearchSettings:
    """The values that a search tries, each in the order of preference, and how factors are learned.

    Raises:
        DataError: a value is out of range, or a selection is none.
    """

    selections: Sequence[str] = ("fisher", "dvp")
    """Methods of attribution, as a comparison names them: "dvp", "hones_logprob", "fisher:ratio" (docs/methods.md)."""
    sizes: Sequence[float] = (0.01, 0.02, 0.005)
    """Shares of all neurons."""
    grid: FitGrid = field(default_factory=lambda: FitGrid(lrs=(0.02, 0.08, 0.005)))
    """Learning rates, and what each trial chooses on dev: epochs and strength."""
    fit: FitSettings = field(default_factory=FitSettings)
    """How factors are learned; learning rate and epochs are the grid's. Its seed also draws the examples below."""
    attribution_examples: int = 128
    """Neurons are found on so many of the examples, drawn at random, or on all where there are fewer."""

    def __post_init__(self) -> None:
        if not self.selections:
            raise DataError("selections are empty; give at least one")
        for selection in self.selections:
            method = parse(selection)
            if methods.METHODS[method.base].contrast is not None or method.options.needs_all_tasks:
                raise DataError(f"selection {selection!r} compares all tasks of a comparison; leave it out of a search")
        if not self.sizes:
            raise DataError("sizes are empty; give at least one")
        for size in self.sizes:
            check_fraction(size)
        if self.fit.keep is not None:
            raise DataError("keep prunes a bank while it learns, and a search tries sizes instead; leave it out")
        if self.attribution_examples < 1:
            raise DataError(f"attribution_examples must be at least 1, not {self.attribution_examples}")

    @property
    def contrasted(self) -> list[str]:
        """The selections that need examples of other tasks."""
        return [selection for selection in self.selections if parse(selection).contrast is not None]

    @property
    def plan(self) -> list[Trial]:
        """All trials, in their order: first the first of everything, then what is farther down in the three lists.

        A trial's place is the sum of its places in the lists; of equals the learning rate varies first, the selection
        last. So a search that ends early has seen something of each list.
        """
        places = product(range(len(self.selections)), range(len(self.sizes)), range(len(self.grid.lrs)))
        trials = (Trial(self.selections[i], self.sizes[j], self.grid.lrs[k]) for i, j, k in sorted(places, key=sum))
        return list(dict.fromkeys(trials))
