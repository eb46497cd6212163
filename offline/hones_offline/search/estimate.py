"""Estimates of the time that a search takes, from one optimizer step and one batch of dev examples."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hones_offline.data.neurons import NeuronIndex, bank_size
from hones_offline.learning.choosing import dev_log_probabilities
from hones_offline.learning.factors import fit_prepared
from hones_offline.running.evaluation import score
from hones_offline.running.execution import Execution
from hones_offline.search import clock
from hones_offline.search.data import EncodedData
from hones_offline.search.settings import SearchSettings


def estimate(encoded: EncodedData, settings: SearchSettings, execution: Execution) -> tuple[float, float]:
    """Estimate the seconds of the shortest trial, and of what is measured at its end on test and on other tasks.

    A trial learns at least until patience is over, measures dev after each epoch and at each strength, and finds its
    neurons first.
    """
    grid, fit = settings.grid, replace(settings.fit, epochs=1)
    per_step = fit.batch_size * fit.accumulation_steps
    index = NeuronIndex.of(encoded.data.decoder.layout)
    # Neurons of the first layers, from which the way back is the longest.
    bank = index.bank(np.arange(bank_size(max(settings.sizes), index.size)))
    step = _seconds(lambda: fit_prepared(encoded.data.first(per_step), bank, fit, Execution()))
    batch = encoded.dev.first(execution.batch_size)

    def measure() -> None:
        score(batch, batch_size=execution.batch_size)
        dev_log_probabilities(batch, None, execution.batch_size)

    per_example = _seconds(measure) / len(batch)
    epochs = min(grid.epochs, grid.patience + 1)
    learning = epochs * math.ceil(len(encoded.data) / per_step) * step
    choosing = (epochs + len(grid.strengths) - 1) * len(encoded.dev) * per_example
    finding = min(settings.attribution_examples, len(encoded.data)) / per_step * step
    measured = len(encoded.test) + sum(map(len, encoded.others))
    return finding + learning + choosing, 2 * measured * per_example


def _seconds(work: Callable[[], object]) -> float:
    begun = clock.now()
    work()
    return clock.now() - begun
