"""A task's splits with everything that is measured or learned on them, each once."""

import hashlib
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from hones_offline.data.metrics import FloatArray
from hones_offline.data.neurons import Bank, FfnKey, NeuronIndex
from hones_offline.learning.adapters import Adapter, adapted, adapter_run_settings, trained_by_epoch
from hones_offline.learning.choosing import DevScore, FitGrid, choose, choose_fit, dev_log_probabilities
from hones_offline.learning.factors import FitSettings, fit_prepared, fit_run_settings, losses_of
from hones_offline.learning.methods import SteeringInputs
from hones_offline.running.evaluation import Scores, intervention, position_means, score
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared
from hones_offline.running.run_folder import RunFolder, examples_digest, read_json, run_settings, step_name
from hones_steer.profile import Profile

Split = Literal["discovery", "dev", "test"]
Steered = Profile | Adapter
"""A profile, or an adapter in its place."""


class Splits:
    """A task's encoded discovery, dev and test examples, and the run folder their results are kept in.

    Everything is chosen on the discovery and dev splits; the test split is only measured. Each result is one step of
    the run folder, named by what was done to the model, so that a killed run goes on where it stopped.
    """

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

    @property
    def parts(self) -> dict[Split, Prepared]:
        """The examples of each split."""
        return {"discovery": self.discovery, "dev": self.dev, "test": self.test}

    def measure(
        self,
        split: Split,
        *,
        steering: Steered | None = None,
        mask: Mapping[FfnKey, npt.NDArray[np.int32]] | None = None,
        fill: FloatArray | None = None,
    ) -> Scores:
        """The metric on a split as it is, steered or with a bank masked; the same is measured once.

        A masked bank's activations are set to 0, or to their values of `fill` [N].
        """
        examples = self.parts[split]
        bank = None if mask is None else Bank(mask)
        name = f"{split}-base"
        if steering is not None:
            name = f"{split}-steered-{steering.digest[:16]}"
        if bank is not None:
            name = f"{split}-masked-{bank.digest}"
            if fill is not None:
                index = NeuronIndex.of(examples.decoder.layout)
                used = fill[bank.numbers(index)]
                name += f"-set-{hashlib.sha256(used.tobytes()).hexdigest()[:16]}"

        def compute() -> dict[str, FloatArray]:
            with _changed(examples, steering) as changed, intervention(changed, mask=bank, fill=fill):
                return {"statistics": score(changed, batch_size=self.batch_size).statistics}

        statistics = self.run.arrays(name, compute)["statistics"]
        value = self.task.aggregate(statistics.sum(axis=0), len(statistics))
        return Scores(self.task, value, statistics, outputs=(), failures=examples.failures)

    def measure_beside(self, examples: Prepared, steering: Steered | None = None) -> Scores:
        """The metric on examples of no split, such as another task's, as they are or steered; measured once."""
        decisive = [run_settings(examples), self.batch_size, steering and steering.digest]

        def compute() -> dict[str, FloatArray]:
            with _changed(examples, steering) as changed:
                return {"statistics": score(changed, batch_size=self.batch_size).statistics}

        statistics = self.run.arrays(step_name(f"other-{examples.task.name}", decisive), compute)["statistics"]
        value = examples.task.aggregate(statistics.sum(axis=0), len(statistics))
        return Scores(examples.task, value, statistics, outputs=(), failures=examples.failures)

    def position_means(self) -> FloatArray:
        """`position_means` of the discovery examples, [N]; a step."""

        def compute() -> dict[str, FloatArray]:
            return {"means": position_means(self.discovery, batch_size=self.batch_size)}

        return self.run.arrays("discovery-position-means", compute)["means"]

    def dev_score(self, steering: Steered) -> DevScore:
        """How well a profile or an adapter does on dev; the same is measured once."""

        def compute() -> dict[str, FloatArray]:
            with _changed(self.dev, steering) as dev:
                return {"means": dev_log_probabilities(dev, None, self.batch_size)}

        means = self.run.arrays(f"dev-logprob-{steering.digest[:16]}", compute)["means"]
        return DevScore(self.measure("dev", steering=steering).value, float(means.mean()))

    def learned(self, name: str, bank: Bank, settings: FitSettings, *, progress: bool = False) -> Profile:
        """`fit_prepared` on the discovery examples, kept in a folder of its own; the same is learned once."""
        execution = Execution(folder=self._fit_folder(name, bank, settings), progress=progress)
        return fit_prepared(self.discovery, bank, settings, execution, name=name)

    def learned_on_dev(
        self, name: str, bank: Bank, settings: FitSettings, grid: FitGrid, *, progress: bool = False
    ) -> Profile:
        """`choose_fit` on the discovery and dev examples; every epoch is learned, and measured, once.

        The table of all trials is kept in the run folder, as `trials-NAME-DIGEST.json`.
        """
        choice = choose_fit(
            self.discovery,
            bank,
            settings,
            grid,
            self.dev_score,
            folder=lambda changed: self._fit_folder(name, bank, changed),
            name=name,
            progress=progress,
        )
        wanted = {"name": name, "grid": asdict(grid), **fit_run_settings(self.discovery, bank, settings)}
        self.run.json(step_name(f"trials-{name}", wanted), choice.table)
        return choice.chosen

    def adapter_on_dev(self, kind: str, settings: FitSettings, grid: FitGrid, *, progress: bool = False) -> Adapter:
        """An adapter trained on the discovery examples and chosen on dev as factors are (`learned_on_dev`).

        Each trial's epochs are steps of a folder of their own, which goes once the choice is kept: they are large.
        """
        wanted = {"grid": asdict(grid), **adapter_run_settings(self.discovery, kind, settings)}
        name = step_name(kind, wanted)
        losses = losses_of(self.discovery, settings)

        def folder(lr: float) -> Path:
            return self.path / f"{name}-lr-{lr}"

        def train(lr: float) -> Generator[tuple[int, Adapter]]:
            changed = replace(settings, lr=lr, epochs=grid.epochs)
            run = RunFolder(folder(lr), adapter_run_settings(self.discovery, kind, changed))
            execution = Execution(folder=run, progress=progress)
            return trained_by_epoch(self.discovery, kind, changed, execution, losses=losses)

        def chosen() -> Mapping[str, npt.NDArray[np.float32]]:
            choice = choose(grid, train, Adapter.__mul__, self.dev_score)
            self.run.json(f"trials-{name}", choice.table)
            self.run.json(f"chosen-{name}", lambda: {**choice.chosen.method, "chosen_on_dev": choice.on_dev})
            return choice.chosen.weights

        weights = self.run.arrays(f"chosen-{name}", chosen)
        for lr in grid.lrs:
            if (trial := folder(lr)).exists():
                shutil.rmtree(trial)
        return Adapter(kind, weights, read_json(self.path / f"chosen-{name}.json"))

    def _fit_folder(self, name: str, bank: Bank, settings: FitSettings) -> RunFolder:
        """Where the states of this learning are kept, and of no other."""
        wanted = {"name": name, **fit_run_settings(self.discovery, bank, settings)}
        return RunFolder(self.path / step_name("fit", wanted), wanted)

    def steering_inputs(
        self,
        bank: Bank,
        random_bank: Bank,
        settings: FitSettings,
        *,
        grid: FitGrid | None = None,
        progress: bool = False,
    ) -> SteeringInputs:
        """The inputs of every way of steering: learning keeps its steps here, and dev is measured here.

        With a grid, what is learned is chosen from it on dev.
        """

        def learned(name: str, neurons: Bank, changed: FitSettings) -> Profile:
            if grid is None:
                return self.learned(name, neurons, changed, progress=progress)
            return self.learned_on_dev(name, neurons, changed, grid, progress=progress)

        return SteeringInputs(
            self.discovery,
            bank,
            random_bank,
            settings,
            learn=learned,
            dev_metric=lambda profile: self.measure("dev", steering=profile).value,
        )


@contextmanager
def _changed(examples: Prepared, steering: Steered | None) -> Iterator[Prepared]:
    """Within the block, the model is steered by a profile, has an adapter, or is as it is; yields the examples."""
    if isinstance(steering, Adapter):
        with adapted(examples, steering) as inside:
            yield inside
    else:
        with intervention(examples, steering=steering):
            yield examples
