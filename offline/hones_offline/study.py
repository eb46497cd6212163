"""One task studied end to end: bank, masking and steering against their controls, measured on held-out examples.

Everything is chosen on the discovery and dev splits; the test split is only measured. Each result is one step of a run
folder, so a killed study goes on where it stopped and ends in the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hones_offline.banks import Bank, bank_size, random_bank, select_bank
from hones_offline.evaluate import intervention, score
from hones_offline.fit import FIXED_AMP, GRID, FitSettings, learn, uniform_profile
from hones_offline.heads import HeadMetric
from hones_offline.metrics import FloatArray, bootstrap_interval, paired_bootstrap_interval
from hones_offline.pipeline import Attribution, find_bank
from hones_offline.prompts import Prepared
from hones_offline.runs import RunFolder, examples_digest
from hones_steer.profile import ModelIdentity, Profile


@dataclass(frozen=True)
class StudySettings:
    """Everything a study's results depend on besides model and examples."""

    top_heads: int = 30
    head_metric: HeadMetric = "task"
    fractions: Sequence[float] = (0.01,)
    """Bank sizes tried on dev; the one whose masking costs most beyond random masking is taken."""
    random_banks: int = 5
    """Random banks masked on test; the first also carries the RandNeuron baseline."""
    batch_size: int = 64
    fit: FitSettings = field(default_factory=FitSettings)


@dataclass(frozen=True)
class Measured:
    """A metric on one split: its value and the per-example statistics [n, k] it is made from."""

    value: float
    statistics: FloatArray


@dataclass(frozen=True)
class Study:
    """What was found for one task; `test` holds a measurement per method, all on the same examples."""

    attribution: Attribution
    bank: Bank
    bank_fraction: float
    grid_factor: float
    test: Mapping[str, Measured]
    masked_random: Sequence[float]
    profile: Profile


class Splits:
    """A task's encoded discovery, dev and test examples, and the run folder their results are kept in."""

    def __init__(
        self, discovery: Prepared, dev: Prepared, test: Prepared, run_path: Any, settings: StudySettings
    ) -> None:
        self.discovery, self.dev, self.test, self.settings = discovery, dev, test, settings
        self.task = discovery.task
        splits = {"discovery": discovery, "dev": dev, "test": test}
        self.run = RunFolder(
            run_path,
            {
                "stage": "study",
                "task": self.task.name,
                "model": asdict(ModelIdentity.from_model(discovery.decoder.model)),
                "examples": {name: examples_digest(split.examples) for name, split in splits.items()},
                **asdict(settings),
            },
        )

    def measure(
        self, name: str, split: Prepared, *, steering: Profile | None = None, mask: Bank | None = None
    ) -> Measured:
        """The metric on a split under an intervention; a step of the run folder called `name`."""

        def compute() -> dict[str, FloatArray]:
            with intervention(split, steering=steering, mask=mask):
                return {"statistics": score(split, batch_size=self.settings.batch_size).statistics}

        statistics = self.run.arrays(name, compute)["statistics"]
        return Measured(self.task.aggregate(statistics.sum(axis=0), len(statistics)), statistics)


def study(splits: Splits, report: Callable[[str], object] = lambda _: None, *, progress: bool = False) -> Study:
    """Run the whole method and its baselines on one task; `report` is told each stage as it begins."""
    settings, width = splits.settings, splits.discovery.decoder.layout.intermediate_size
    report("head scores and neuron importance")
    found = find_bank(
        splits.discovery,
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

    hones = learned("hones", bank)
    steered = {
        "fixed_amp": uniform_profile(splits.discovery, bank, FIXED_AMP, "fixed_amp"),
        "random_neurons": learned("random_neurons", randoms[0]),
        "hones_no_kl": learned("hones_no_kl", bank, beta_kl=0.0),
        "hones": hones,
    }
    report("grid search, on dev")
    grid_factor = _choose_grid_factor(splits, bank)
    steered["grid_search"] = uniform_profile(splits.discovery, bank, grid_factor, "grid_search")

    report("everything on test")
    test = {"base": splits.measure("test-base", splits.test)}
    test["masked"] = splits.measure("test-masked", splits.test, mask=bank)
    masked_random = [
        splits.measure(f"test-masked-random-{i}", splits.test, mask=neurons) for i, neurons in enumerate(randoms)
    ]
    for name, profile in steered.items():
        test[name] = splits.measure(f"test-{name}", splits.test, steering=profile)
    return Study(
        found,
        bank,
        fraction,
        grid_factor,
        test,
        [m.value for m in masked_random],
        _with_evidence(splits, hones, test),
    )


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


def _choose_grid_factor(splits: Splits, bank: Bank) -> float:
    """The uniform factor with the best metric on dev; the one nearest 1 of equals."""

    def on_dev(factor: float) -> float:
        profile = uniform_profile(splits.dev, bank, factor, "grid_search")
        return splits.measure(f"dev-grid-{factor:g}", splits.dev, steering=profile).value

    return max(sorted(GRID, key=lambda factor: abs(factor - 1)), key=on_dev)


def _with_evidence(splits: Splits, profile: Profile, test: Mapping[str, Measured]) -> Profile:
    """The profile with what was measured on the test split inside."""
    low, high = paired_bootstrap_interval(
        test["hones"].statistics, test["base"].statistics, splits.task.aggregate, seed=0
    )
    return Profile(
        task=profile.task,
        layers=profile.layers,
        base_model=profile.base_model,
        description=profile.description,
        license=profile.license,
        method=profile.method,
        evidence={
            "split": "test",
            "metric": splits.task.metric,
            "n": len(splits.test),
            "base": test["base"].value,
            "steered": test["hones"].value,
            "gain_ci95": [low, high],
            "masked": test["masked"].value,
        },
    )


def summarize(splits: Splits, result: Study) -> dict[str, Any]:
    """One task's row of the summary: values, 95% intervals of each, and of each difference to base."""
    aggregate = splits.task.aggregate
    base = result.test["base"].statistics
    return {
        "metric": splits.task.metric,
        "n": len(splits.test),
        **{name: measured.value for name, measured in result.test.items()},
        "masked_random": float(np.mean(result.masked_random)),
        "masked_random_banks": list(result.masked_random),
        "ci95": {
            name: bootstrap_interval(measured.statistics, aggregate, seed=0) for name, measured in result.test.items()
        },
        "difference_to_base_ci95": {
            name: paired_bootstrap_interval(measured.statistics, base, aggregate, seed=0)
            for name, measured in result.test.items()
            if name != "base"
        },
        "bank_fraction": result.bank_fraction,
        "bank_neurons": bank_size(result.bank),
        "grid_factor": result.grid_factor,
        "heads": result.attribution.heads,
        "failures": {
            name: split.failures
            for name, split in (("discovery", splits.discovery), ("dev", splits.dev), ("test", splits.test))
        },
    }
