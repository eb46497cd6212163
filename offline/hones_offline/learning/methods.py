"""The ways of steering with a bank by name: learned factors, and their baselines (docs/methods.md).

A way is one entry of `STEERING_METHODS`: commands, studies and reports take their lists and titles from there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from hones_offline.data.neurons import Bank, NeuronIndex
from hones_offline.learning.factors import FitSettings, grid_search, uniform_profile
from hones_offline.running.prompts import Prepared
from hones_steer.profile import Profile

FIXED_AMP = 2.0


@dataclass(frozen=True)
class SteeringInputs:
    """The inputs of a way of steering: a task's discovery examples, its bank, and dev examples to choose on."""

    prepared: Prepared
    """The discovery examples."""
    bank: Bank
    random_bank: Bank
    """As many neurons in each layer, drawn at random."""
    settings: FitSettings
    learn: Callable[[str, Bank, FitSettings], Profile]
    """(method's name, bank, settings) -> the learned profile, resumable."""
    dev_metric: Callable[[Profile], float]
    """The task's metric on dev when a profile steers."""

    @property
    def every_neuron(self) -> Bank:
        """All of the model's FFN neurons."""
        index = NeuronIndex.of(self.prepared.decoder.layout)
        return index.bank(np.arange(index.size))


@dataclass(frozen=True)
class SteeringMethod:
    """A way of steering with a bank: its names for readers, and the function that gives the profile."""

    title: str
    """The name in a report."""
    column: str
    """The name above a narrow column."""
    profile: Callable[[SteeringInputs], Profile]
    chosen_on_dev: bool = False
    """Whether dev examples are needed."""
    learned: bool = True
    """Whether factors are learned, so that settings of learning count."""


STEERING_METHODS: Mapping[str, SteeringMethod] = MappingProxyType(
    {
        "fixed_amp": SteeringMethod(
            "fixed factor",
            "fixed ×2",
            lambda inputs: uniform_profile(inputs.prepared, inputs.bank, FIXED_AMP, "fixed_amp"),
            learned=False,
        ),
        "grid_search": SteeringMethod(
            "grid search",
            "grid",
            lambda inputs: grid_search(inputs.prepared, inputs.bank, inputs.dev_metric),
            chosen_on_dev=True,
            learned=False,
        ),
        "random_neurons": SteeringMethod(
            "random neurons",
            "random neurons",
            lambda inputs: inputs.learn("random_neurons", inputs.random_bank, inputs.settings),
        ),
        "hones_no_kl": SteeringMethod(
            "HONES, no KL",
            "no KL",
            lambda inputs: inputs.learn("hones_no_kl", inputs.bank, replace(inputs.settings, beta_kl=0.0)),
        ),
        "sparse": SteeringMethod(
            "learned sparsity",
            "sparse",
            lambda inputs: inputs.learn("sparse", inputs.every_neuron, replace(inputs.settings, keep=inputs.bank.size)),
        ),
        "hones": SteeringMethod("HONES", "HONES", lambda inputs: inputs.learn("hones", inputs.bank, inputs.settings)),
    }
)
"""Every way, in the order of the steering table."""
