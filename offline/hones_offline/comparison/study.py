"""A task's splits with everything measured on them, and its study: masking and steering against their controls.

Everything is chosen on the discovery and dev splits; the test split is only measured. Each result is one step of a run
folder, named by what was done to the model, so that a killed run goes on where it stopped and nothing is done twice.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hones_offline.attribution.pipeline import Attribution
from hones_offline.data.metrics import FloatArray
from hones_offline.data.neurons import Bank, bank_digest, bank_size, random_bank, select_bank
from hones_offline.learning.factors import FIXED_AMP, FitSettings, fit_run_settings, grid_search, learn, uniform_profile
from hones_offline.running.evaluation import Scores, intervention, score
from hones_offline.running.prompts import Prepared
from hones_offline.running.run_folder import RunFolder, examples_digest, json_bytes, run_settings
from hones_steer.profile import Profile

STEERED = ("base", "fixed_amp", "grid_search", "random_neurons", "hones_no_kl", "hones")
"""The rows of the steering table (design 2.7)."""
Split = Literal["discovery", "dev", "test"]


class Splits:
    """A task's encoded discovery, dev and test examples, and the run folder their results are kept in."""

    def __init__(
        self, discovery: Prepared, dev: Prepared, test: Prepared, run_path: str | Path, *, batch_size: int
    ) -> None:
        self.discovery, self.dev, self.test, self.batch_size = discovery, dev, test, batch_size
        self.task = discovery.task
        self.path = Path(run_path)
        self.run = RunFolder(
            self.path,
            {
                "stage": "splits",
                **run_settings(discovery),
                "dev": examples_digest(dev.examples),
                "test": examples_digest(test.examples),
                "batch_size": batch_size,
            },
        )

    def of(self, split: Split) -> Prepared:
        """The examples of a split."""
        return {"discovery": self.discovery, "dev": self.dev, "test": self.test}[split]

    def measure(self, split: Split, *, steering: Profile | None = None, mask: Bank | None = None) -> Scores:
        """The metric on a split as it is, steered or with a bank masked; the same is measured once."""
        examples = self.of(split)
        name = f"{split}-base"
        if steering is not None:
            name = f"{split}-steered-{steering.digest[:16]}"
        if mask is not None:
            name = f"{split}-masked-{bank_digest(mask)}"

        def compute() -> dict[str, FloatArray]:
            with intervention(examples, steering=steering, mask=mask):
                return {"statistics": score(examples, batch_size=self.batch_size).statistics}

        statistics = self.run.arrays(name, compute)["statistics"]
        value = self.task.aggregate(statistics.sum(axis=0), len(statistics))
        return Scores(self.task, value, statistics, outputs=(), failures=examples.failures)

    def learned(self, name: str, bank: Bank, settings: FitSettings, *, progress: bool = False) -> Profile:
        """`fit.learn` on the discovery examples, kept in a folder of its own; the same is learned once."""
        wanted = {"name": name, **fit_run_settings(self.discovery, bank, settings)}
        digest = hashlib.sha256(json_bytes(wanted)).hexdigest()[:16]
        run = RunFolder(self.path / f"fit-{digest}", wanted)
        return learn(self.discovery, bank, settings, run=run, name=name, progress=progress)


def steered_profiles(
    splits: Splits, bank: Bank, random: Bank, fit: FitSettings, *, progress: bool = False
) -> dict[str, Profile]:
    """A profile for each way of steering in `STEERED` but the base, with the factors of a grid chosen on dev."""

    def on_dev(profile: Profile) -> float:
        return splits.measure("dev", steering=profile).value

    return {
        "fixed_amp": uniform_profile(splits.discovery, bank, FIXED_AMP, "fixed_amp"),
        "grid_search": grid_search(splits.discovery, bank, on_dev),
        "random_neurons": splits.learned("random_neurons", random, fit, progress=progress),
        "hones_no_kl": splits.learned("hones_no_kl", bank, replace(fit, beta_kl=0.0), progress=progress),
        "hones": splits.learned("hones", bank, fit, progress=progress),
    }


@dataclass(frozen=True)
class StudySettings:
    """What a study's results depend on besides examples and attribution."""

    fractions: Sequence[float] = (0.01,)
    """Bank sizes tried on dev; the one whose masking costs most beyond random masking is taken."""
    random_banks: int = 5
    """Random banks masked on test; the first also carries the RandNeuron baseline."""
    fit: FitSettings = field(default_factory=FitSettings)


@dataclass(frozen=True)
class Study:
    """What was found for one task; `test` holds a measurement per method, all on the same examples."""

    bank: Bank
    bank_fraction: float
    test: Mapping[str, Scores]
    masked_random: Sequence[float]
    profiles: Mapping[str, Profile]


def study(
    splits: Splits,
    found: Attribution,
    settings: StudySettings,
    report: Callable[[str], object] = lambda _: None,
    *,
    progress: bool = False,
) -> Study:
    """Size a task's bank, mask it and steer it beside all controls; `report` is told each stage as it begins."""
    width = splits.discovery.decoder.layout.intermediate_size
    report("bank size, on dev")
    fraction = _choose_fraction(splits, found, sorted(settings.fractions))
    bank = select_bank(found.importance, fraction)
    randoms = [random_bank(bank, width, seed) for seed in range(settings.random_banks)]
    report("learning scales, grid search on dev")
    steered = steered_profiles(splits, bank, randoms[0], settings.fit, progress=progress)
    report("everything on test")
    test = {"base": splits.measure("test"), "masked": splits.measure("test", mask=bank)}
    masked_random = [splits.measure("test", mask=neurons).value for neurons in randoms]
    test |= {name: splits.measure("test", steering=profile) for name, profile in steered.items()}
    evidence = {**test["hones"].evidence(test["base"], "test"), "masked": test["masked"].value}
    steered["hones"] = replace(steered["hones"], evidence=evidence)
    return Study(bank, fraction, test, masked_random, steered)


def _choose_fraction(splits: Splits, found: Attribution, fractions: Sequence[float]) -> float:
    """The size at which masking the bank costs most beyond masking a random one, on dev; the smaller of equals."""
    width = splits.discovery.decoder.layout.intermediate_size

    def margin(fraction: float) -> float:
        bank = select_bank(found.importance, fraction)
        own = splits.measure("dev", mask=bank)
        other = splits.measure("dev", mask=random_bank(bank, width, seed=0))
        return other.value - own.value

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
        "bank_neurons": bank_size(result.bank),
    }
