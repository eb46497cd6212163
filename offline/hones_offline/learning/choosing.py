"""Learning rate, epochs and strength of learned factors, chosen on dev from one grid.

docs/methods.md, "Choices on dev", has the rule. Every bank, and whatever else is learned and compared with it, chooses
from the same grid by the same rule.
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from hones_offline.attribution.measurements import AnswerLogProbability
from hones_offline.data.metrics import FloatArray
from hones_offline.data.neurons import Bank
from hones_offline.learning.factors import FitSettings, learned_by_epoch, losses_of
from hones_offline.running.evaluation import intervention
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared
from hones_offline.running.run_folder import RunFolder
from hones_steer.errors import DataError
from hones_steer.profile import Profile

T = TypeVar("T")


@dataclass(frozen=True)
class FitGrid:
    """The values that are tried on dev.

    Raises:
        DataError: a value is out of range, or there is none.
    """

    lrs: Sequence[float] = (0.005, 0.02, 0.08)
    """Learning rates."""
    epochs: int = 8
    """Passes over the examples at most; the learning rate falls over all of them."""
    patience: int = 2
    """Epochs without a better one on dev after which learning stops."""
    strengths: Sequence[float] = (0.5, 1.0, 1.5, 2.0)
    """Factors of the learned offsets."""

    def __post_init__(self) -> None:
        for name in ("lrs", "strengths"):
            values = getattr(self, name)
            if not values:
                raise DataError(f"{name} are empty; give at least one")
            for value in values:
                if not 0 < value < math.inf:
                    raise DataError(f"{name} must be positive, not {value}")
        for name in ("epochs", "patience"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def usual_strength(self) -> float:
        """The strength that epochs are compared at: the nearest to 1."""
        return min(self.strengths, key=lambda strength: abs(strength - 1))


@dataclass(frozen=True, order=True)
class DevScore:
    """How well something does on dev; of two with the same metric the one with the likelier answers is better."""

    metric: float
    """The task's metric."""
    log_probability: float
    """The mean over dev's (prompt, answer) pairs of the mean log-probability of the answer's tokens."""


@dataclass(frozen=True)
class Trial:
    """One measurement on dev."""

    lr: float
    epoch: int
    strength: float
    score: DevScore

    @property
    def rank(self) -> tuple[DevScore, float, int]:
        """The larger the better; of equals the one that changes less, or was learned for fewer epochs."""
        return self.score, -self.strength, -self.epoch

    def to_json(self) -> dict[str, Any]:
        """The trial as one flat row."""
        return {"lr": self.lr, "epoch": self.epoch, "strength": self.strength, **asdict(self.score)}


@dataclass(frozen=True)
class Choice(Generic[T]):
    """The chosen one, its trial, and all trials in the order they were made."""

    chosen: T
    best: Trial
    trials: Sequence[Trial]

    @property
    def on_dev(self) -> dict[str, Any]:
        """The chosen strength, the number of trials, and how well the chosen one does on dev."""
        return {"strength": self.best.strength, "trials": len(self.trials), **asdict(self.best.score)}

    def table(self) -> list[dict[str, Any]]:
        """The trials as rows."""
        return [trial.to_json() for trial in self.trials]


def choose(
    grid: FitGrid,
    learn: Callable[[float], Generator[tuple[int, T]]],
    strengthen: Callable[[T, float], T],
    measure: Callable[[T], DevScore],
) -> Choice[T]:
    """Learn at every rate and take what is best on dev.

    At each learning rate the states after the epochs are measured, at the strength nearest to 1, until `patience`
    epochs have brought nothing better; the best of them is measured at the other strengths too. So whatever is learned
    is chosen among as many candidates, learning rates times strengths.

    Args:
        grid: the values that are tried.
        learn: a learning rate -> (number of the epoch from 1, what was learned) after each epoch. An epoch is learned
            when it is asked for.
        strengthen: what was learned, with its offsets times a strength.
        measure: how well that does on dev.
    """
    trials: list[Trial] = []

    def try_on_dev(lr: float, epoch: int, strength: float, learned: T) -> Trial:
        trials.append(Trial(lr, epoch, strength, measure(strengthen(learned, strength))))
        return trials[-1]

    usual = grid.usual_strength
    candidates: list[tuple[Trial, T]] = []
    for lr in grid.lrs:
        stopped: list[tuple[Trial, T]] = []  # the best epoch so far
        with closing(learn(lr)) as epochs:
            for epoch, learned in epochs:
                trial = try_on_dev(lr, epoch, usual, learned)
                if not stopped or trial.rank > stopped[0][0].rank:
                    stopped = [(trial, learned)]
                elif epoch - stopped[0][0].epoch >= grid.patience:
                    break
        [(best, learned)] = stopped
        candidates.append((best, learned))
        for strength in grid.strengths:
            if strength != usual:
                candidates.append((try_on_dev(lr, best.epoch, strength, learned), learned))
    best, learned = max(candidates, key=lambda candidate: candidate[0].rank)
    return Choice(strengthen(learned, best.strength), best, trials)


def choose_fit(
    prepared: Prepared,
    bank: Bank,
    settings: FitSettings,
    grid: FitGrid,
    measure: Callable[[Profile], DevScore],
    *,
    folder: Callable[[FitSettings], RunFolder | None],
    name: str = "hones",
    progress: bool = False,
) -> Choice[Profile]:
    """`choose` among learned factors; the profile's `method["chosen_on_dev"]` says what was chosen.

    Args:
        prepared: the discovery examples.
        bank: the neurons whose factors are learned.
        settings: how they are learned; learning rate and epochs are the grid's.
        grid: the values that are tried.
        measure: how well a profile does on dev.
        folder: the settings of one learning rate -> where its states are kept.
        name: the method's name, for the profile's metadata.
        progress: show progress bars on a terminal.
    """
    losses = losses_of(prepared, settings)

    def learn(lr: float) -> Generator[tuple[int, Profile]]:
        changed = replace(settings, lr=lr, epochs=grid.epochs)
        execution = Execution(folder=folder(changed), progress=progress)
        return learned_by_epoch(prepared, bank, changed, execution, name=name, losses=losses)

    choice = choose(grid, learn, strengthened, measure)
    method = {**choice.chosen.method, "chosen_on_dev": choice.on_dev}
    return replace(choice, chosen=replace(choice.chosen, method=method))


def strengthened(profile: Profile, strength: float) -> Profile:
    """A profile with its offsets times a strength, and its own metadata."""
    return replace(profile * strength, description=profile.description, method=profile.method)


def dev_log_probabilities(dev: Prepared, profile: Profile | None, batch_size: int) -> FloatArray:
    """The mean token log-probability of every (prompt, answer) pair of dev when a profile steers, float64 [pairs].

    Without one the model runs as it is, with an adapter that is in it.
    """
    measured = AnswerLogProbability(dev, dev.pairs(), Execution(batch_size=batch_size))
    with torch.no_grad(), intervention(dev, steering=profile):
        return measured.undisturbed(dev.decoder.run)[:, 0]
