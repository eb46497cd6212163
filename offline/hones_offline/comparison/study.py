"""The study of one task: its bank is sized on dev, then masked and steered with beside all controls on test."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hones_offline.attribution.pipeline import Attribution
from hones_offline.comparison.splits import Splits
from hones_offline.data.neurons import Bank, NeuronIndex
from hones_offline.learning.factors import FitSettings
from hones_offline.learning.methods import STEERING_METHODS
from hones_offline.running.evaluation import Scores
from hones_steer.profile import Profile

STEERED = ("base", *STEERING_METHODS)
"""The rows of the steering table."""


def steered_profiles(
    splits: Splits,
    bank: Bank,
    random_bank: Bank,
    settings: FitSettings,
    methods: Sequence[str] = tuple(STEERING_METHODS),
    *,
    progress: bool = False,
) -> dict[str, Profile]:
    """A profile for each of these ways of steering."""
    inputs = splits.steering_inputs(bank, random_bank, settings, progress=progress)
    return {name: STEERING_METHODS[name].profile(inputs) for name in methods}


@dataclass(frozen=True)
class StudySettings:
    """Settings that a study's results depend on, besides examples and attribution."""

    fractions: Sequence[float] = (0.01,)
    """Bank sizes tried on dev; the one whose masking costs most beyond random masking is taken."""
    random_banks: int = 5
    """Random banks masked on test; the first also carries the baseline "random_neurons"."""
    steering: Sequence[str] = tuple(STEERING_METHODS)
    """The ways of steering, "hones" among them, whose profile gets the evidence."""
    fit: FitSettings = field(default_factory=FitSettings)


@dataclass(frozen=True)
class Study:
    """The results for one task; `test` holds a measurement per method, all on the same examples."""

    bank: Bank
    bank_fraction: float
    test: Mapping[str, Scores]
    masked_random: Sequence[float]
    profiles: Mapping[str, Profile]


def study(
    splits: Splits,
    attribution: Attribution,
    settings: StudySettings,
    report: Callable[[str], object] = lambda _: None,
    *,
    progress: bool = False,
) -> Study:
    """Size a task's bank, mask it and steer it beside all controls; `report` is told each stage as it begins."""
    index = NeuronIndex.of(splits.discovery.decoder.layout)
    report("bank size, on dev")
    fraction = _choose_fraction(splits, attribution, sorted(settings.fractions))
    bank = attribution.importance.bank(fraction)
    random_banks = [bank.random(index, seed) for seed in range(settings.random_banks)]
    report("learning scales, grid search on dev")
    steered = steered_profiles(splits, bank, random_banks[0], settings.fit, settings.steering, progress=progress)
    report("everything on test")
    test = {"base": splits.measure("test"), "masked": splits.measure("test", mask=bank)}
    masked_random = [splits.measure("test", mask=neurons).value for neurons in random_banks]
    test |= {name: splits.measure("test", steering=profile) for name, profile in steered.items()}
    evidence = {**test["hones"].evidence(test["base"], "test"), "masked": test["masked"].value}
    steered["hones"] = replace(steered["hones"], evidence=evidence)
    return Study(bank, fraction, test, masked_random, steered)


def _choose_fraction(splits: Splits, attribution: Attribution, fractions: Sequence[float]) -> float:
    """The size at which masking the bank costs most beyond masking a random one, on dev; among equals the smaller."""
    index = NeuronIndex.of(splits.discovery.decoder.layout)

    def margin(fraction: float) -> float:
        bank = attribution.importance.bank(fraction)
        masked = splits.measure("dev", mask=bank)
        random_masked = splits.measure("dev", mask=bank.random(index, seed=0))
        return random_masked.value - masked.value

    return fractions[0] if len(fractions) == 1 else max(fractions, key=margin)


def summarize(result: Study) -> dict[str, Any]:
    """One task's row of the demo's tables: values, and 95% intervals of their differences to base."""
    base = result.test["base"]
    return {
        "metric": base.task.metric,
        "n": base.n,
        **{name: scores.value for name, scores in result.test.items()},
        "masked_random": float(np.mean(result.masked_random)),
        "difference_to_base_ci95": {
            name: scores.gain_interval(base) for name, scores in result.test.items() if name != "base"
        },
        "bank_fraction": result.bank_fraction,
        "bank_neurons": result.bank.size,
    }
