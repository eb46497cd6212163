"""One task studied end to end: bank, masking and steering against their controls, measured on held-out examples.

Everything is chosen on the discovery and dev splits; the test split is only measured. Each result is one step of a run
folder, so a killed study goes on where it stopped and ends in the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from hones_offline.banks import Bank, bank_size, random_bank, select_bank
from hones_offline.evaluate import Scores, intervention, score
from hones_offline.fit import FIXED_AMP, FitSettings, grid_search, learn, uniform_profile
from hones_offline.heads import HeadMetric
from hones_offline.metrics import FloatArray
from hones_offline.pipeline import Attribution, find_bank
from hones_offline.prompts import Prepared
from hones_offline.runs import RunFolder, examples_digest, run_settings
from hones_steer.profile import Profile


@dataclass(frozen=True)
class StudySettings:
    """Everything a study's results depend on besides model and examples."""

    attribution_examples: int | None = None
    """Heads and neurons are found on the first so many discovery examples (all), scales are learned on all."""
    top_heads: int = 30
    head_metric: HeadMetric = "task"
    fractions: Sequence[float] = (0.01,)
    """Bank sizes tried on dev; the one whose masking costs most beyond random masking is taken."""
    random_banks: int = 5
    """Random banks masked on test; the first also carries the RandNeuron baseline."""
    batch_size: int = 64
    fit: FitSettings = field(default_factory=FitSettings)


@dataclass(frozen=True)
class Study:
    """What was found for one task; `test` holds a measurement per method, all on the same examples."""

    attribution: Attribution
    bank: Bank
    bank_fraction: float
    test: Mapping[str, Scores]
    masked_random: Sequence[float]
    profiles: Mapping[str, Profile]


class Splits:
    """A task's encoded discovery, dev and test examples, and the run folder their results are kept in."""

    def __init__(
        self, discovery: Prepared, dev: Prepared, test: Prepared, run_path: Any, settings: StudySettings
    ) -> None:
        self.discovery, self.dev, self.test, self.settings = discovery, dev, test, settings
        self.task = discovery.task
        self.run = RunFolder(
            run_path,
            {
                "stage": "study",
                **run_settings(discovery),
                "dev": examples_digest(dev.examples),
                "test": examples_digest(test.examples),
                **asdict(settings),
            },
        )

    def measure(
        self, name: str, split: Prepared, *, steering: Profile | None = None, mask: Bank | None = None
    ) -> Scores:
        """The metric on a split under an intervention; a step of the run folder called `name`."""

        def compute() -> dict[str, FloatArray]:
            with intervention(split, steering=steering, mask=mask):
                return {"statistics": score(split, batch_size=self.settings.batch_size).statistics}

        statistics = self.run.arrays(name, compute)["statistics"]
        value = self.task.aggregate(statistics.sum(axis=0), len(statistics))
        return Scores(self.task, value, statistics, outputs=(), failures=split.failures)


def study(splits: Splits, report: Callable[[str], object] = lambda _: None, *, progress: bool = False) -> Study:
    """Run the whole method and its baselines on one task; `report` is told each stage as it begins."""
    settings, width = splits.settings, splits.discovery.decoder.layout.intermediate_size
    report("head scores and neuron importance")
    found = find_bank(
        splits.discovery.first(settings.attribution_examples or len(splits.discovery)),
        count=settings.top_heads,
        top_fraction=max(settings.fractions),
        head_metric=settings.head_metric,
        batch_size=settings.batch_size,
        run=splits.run,
        progress=progress,
    )
    report("bank size, on dev")
    fraction = _choose_fraction(splits, found)
    bank = select_bank(found.importance, fraction)
    randoms = [random_bank(bank, width, seed) for seed in range(settings.random_banks)]

    report("learning scales")

    def learned(name: str, neurons: Bank, **changes: Any) -> Profile:
        chosen = FitSettings(**{**asdict(settings.fit), **changes})
        return learn(splits.discovery, neurons, chosen, run=splits.run, name=name, progress=progress)

    steered = {
        "fixed_amp": uniform_profile(splits.discovery, bank, FIXED_AMP, "fixed_amp"),
        "random_neurons": learned("random_neurons", randoms[0]),
        "hones_no_kl": learned("hones_no_kl", bank, beta_kl=0.0),
        "hones": learned("hones", bank),
    }
    report("grid search, on dev")

    def on_dev(profile: Profile) -> float:
        return splits.measure(f"dev-grid-{profile.method['factor']:g}", splits.dev, steering=profile).value

    steered["grid_search"] = grid_search(splits.discovery, bank, on_dev)

    report("everything on test")
    test = {"base": splits.measure("test-base", splits.test)}
    test["masked"] = splits.measure("test-masked", splits.test, mask=bank)
    masked_random = [
        splits.measure(f"test-masked-random-{i}", splits.test, mask=neurons) for i, neurons in enumerate(randoms)
    ]
    for name, profile in steered.items():
        test[name] = splits.measure(f"test-{name}", splits.test, steering=profile)
    evidence = {**test["hones"].evidence(test["base"], "test"), "masked": test["masked"].value}
    steered["hones"] = replace(steered["hones"], evidence=evidence)
    return Study(found, bank, fraction, test, [scores.value for scores in masked_random], steered)


def _choose_fraction(splits: Splits, found: Attribution) -> float:
    """The size at which masking the bank costs most beyond masking a random one, on dev; the smaller of equals."""
    width = splits.discovery.decoder.layout.intermediate_size

    def margin(fraction: float) -> float:
        bank = select_bank(found.importance, fraction)
        own = splits.measure(f"dev-masked-{fraction:g}", splits.dev, mask=bank)
        other = splits.measure(f"dev-masked-random-{fraction:g}", splits.dev, mask=random_bank(bank, width, seed=0))
        return other.value - own.value

    fractions = sorted(splits.settings.fractions)
    return fractions[0] if len(fractions) == 1 else max(fractions, key=margin)


def summarize(splits: Splits, result: Study) -> dict[str, Any]:
    """One task's row of the summary: values, 95% intervals of each, and of each difference to base."""
    base = result.test["base"]
    return {
        "metric": splits.task.metric,
        "n": base.n,
        **{name: scores.value for name, scores in result.test.items()},
        "masked_random": float(np.mean(result.masked_random)),
        "masked_random_banks": list(result.masked_random),
        "ci95": {name: scores.interval() for name, scores in result.test.items()},
        "difference_to_base_ci95": {
            name: scores.gain_interval(base) for name, scores in result.test.items() if name != "base"
        },
        "bank_fraction": result.bank_fraction,
        "bank_neurons": bank_size(result.bank),
        "grid_factor": result.profiles["grid_search"].method["factor"],
        "heads": result.attribution.heads,
        "failures": {
            name: split.failures
            for name, split in (("discovery", splits.discovery), ("dev", splits.dev), ("test", splits.test))
        },
    }
