"""The result file of a `hones attribute` run, which the other commands take the bank from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hones_offline.attribution.pipeline import Attribution
from hones_offline.data.neurons import Bank, NeuronIndex
from hones_offline.data.tasks import Task
from hones_offline.running.run_folder import read_json
from hones_steer.errors import DataError, MismatchError, ProfileError
from hones_steer.layout import find_layout
from hones_steer.profile import ModelIdentity

RESULT = "result.json"


def attribution_result(
    task: Task, attribution: Attribution, skipped: Mapping[str, str], model: ModelIdentity
) -> dict[str, Any]:
    """The part of the result that an attribution decides; `skipped` are the records that its file left out."""
    return {
        "task": task.name,
        "model": asdict(model),
        "metric": task.metric,
        "n": attribution.n,
        "base": attribution.base,
        "heads": attribution.heads,
        "bank": attribution.bank.to_json(),
        "failures": {**skipped, **attribution.failures},
        **({"race": asdict(attribution.race)} if attribution.race else {}),
        **({"preselection": asdict(attribution.preselection)} if attribution.preselection else {}),
    }


@dataclass(frozen=True)
class FoundBank:
    """The bank of a finished `hones attribute` run, and the model it belongs to."""

    folder: Path
    bank: Bank
    model: ModelIdentity

    def for_model(self, model: torch.nn.Module) -> Bank:
        """The bank, if it belongs to this model; raises MismatchError naming the folder if not."""
        try:
            self.model.check(ModelIdentity.from_model(model))
        except MismatchError as error:
            raise MismatchError(
                f"{self.folder} holds the bank of another model; run `hones attribute` on the one given"
            ) from error
        self.bank.check(NeuronIndex.of(find_layout(model)))
        return self.bank


def read_bank(folder: Path, task: Task | None = None) -> FoundBank:
    """The bank that `hones attribute` wrote into a folder, of the given task if any.

    Raises:
        DataError: there is no result, it is damaged, or it is another task's.
    """
    result = read_json(folder / RESULT)
    try:
        bank = Bank({int(layer): np.array(neurons, dtype=np.int32) for layer, neurons in result["bank"].items()})
        found = FoundBank(folder, bank, ModelIdentity(**result["model"]))
        name = result["task"]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ProfileError) as error:
        raise DataError(f"{folder / RESULT} is no result of `hones attribute`; run it again") from error
    if task is not None and name != task.name:
        raise DataError(f"{folder} holds the bank of task {name!r}, not {task.name!r}")
    return found
