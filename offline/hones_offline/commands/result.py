"""Results of `hones attribute`: the bank, which other commands take, and the importance, which contrasts take."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save

from hones_offline.attribution.contrast import Contrast
from hones_offline.attribution.methods import AttributionOptions
from hones_offline.attribution.pipeline import Attribution
from hones_offline.data.examples import Example, Loaded, fingerprint
from hones_offline.data.neurons import Bank, Importance, NeuronIndex
from hones_offline.data.tasks import Task
from hones_offline.running.run_folder import json_bytes, read_arrays, read_json
from hones_steer.errors import DataError, MismatchError, ProfileError
from hones_steer.files import write_atomically
from hones_steer.layout import find_layout
from hones_steer.profile import ModelIdentity

RESULT = "result.json"
IMPORTANCE = "importance.safetensors"
"""Holds `importance`, float32 [N] layer after layer, not contrasted."""


@dataclass(frozen=True)
class FoundBank:
    """The bank of a finished `hones attribute` run, and the model it belongs to."""

    folder: Path
    bank: Bank
    model: ModelIdentity

    def for_model(self, model: torch.nn.Module) -> Bank:
        """The bank, if it belongs to this model; raises MismatchError naming the folder if not."""
        _check_model(self.folder, "bank", self.model, model)
        self.bank.check(NeuronIndex.of(find_layout(model)))
        return self.bank


@dataclass(frozen=True)
class FoundImportance:
    """The importance of a finished `hones attribute` run, its task, and the model it belongs to."""

    folder: Path
    task: str
    values: npt.NDArray[np.float32]
    """[N]."""
    model: ModelIdentity

    def for_model(self, model: torch.nn.Module) -> Importance:
        """The importance, if it belongs to this model; raises MismatchError naming the folder if not."""
        _check_model(self.folder, "importance", self.model, model)
        index = NeuronIndex.of(find_layout(model))
        if len(self.values) != index.size:
            raise _no_importance(self.folder, index.size)
        return Importance(index, self.values)


def _check_model(folder: Path, what: str, found: ModelIdentity, model: torch.nn.Module) -> None:
    try:
        found.check(ModelIdentity.from_model(model))
    except MismatchError as error:
        raise MismatchError(
            f"{folder} holds the {what} of another model; run `hones attribute` on the one given"
        ) from error


def write_result(
    folder: Path,
    task: Task,
    loaded: Loaded,
    options: AttributionOptions,
    attribution: Attribution,
    model: ModelIdentity,
    against: Sequence[FoundImportance] = (),
    contrast: Contrast | None = None,
) -> dict[str, Any]:
    """Write the importance and then the result into a run folder; the result."""
    result = {
        "task": task.name,
        "model": model.to_json(),
        "metric": task.metric,
        "protocol": task.protocol,
        "n": attribution.n,
        "base": attribution.base,
        "heads": attribution.heads,
        "bank": attribution.bank.to_json(),
        "failures": {**loaded.skipped, **attribution.failures},
        "top_fraction": options.top_fraction,
        "method": options.method,
        "options": {name: value for name, value in options.comparable.items() if name != "method"},
        "against": {found.task: str(found.folder) for found in against},
        "contrast": contrast if against else None,
        "examples": [fingerprint(example) for example in loaded.examples],
        **({"race": asdict(attribution.race)} if attribution.race else {}),
        **({"preselection": asdict(attribution.preselection)} if attribution.preselection else {}),
    }
    write_atomically(folder / IMPORTANCE, save({"importance": attribution.importance.values}))
    write_atomically(folder / RESULT, json_bytes(result))
    return result


def read_bank(folder: Path, task: Task | None = None) -> FoundBank:
    """The bank that `hones attribute` wrote into a folder, of the given task if any.

    Raises:
        DataError: there is no result, it is damaged, or it is another task's.
    """
    result = read_json(folder / RESULT)
    try:
        bank = Bank.from_json(result["bank"])
        found = FoundBank(folder, bank, ModelIdentity.from_json(result["model"]))
        name = result["task"]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ProfileError) as error:
        raise _no_result(folder) from error
    if task is not None and name != task.name:
        raise DataError(f"{folder} holds the bank of task {name!r}, not {task.name!r}")
    return found


def read_others(
    folders: Sequence[Path], own: Path, task: Task, examples: Sequence[Example], options: AttributionOptions
) -> list[FoundImportance]:
    """The importance that `hones attribute` wrote into each folder, if this task's can be contrasted with it.

    Args:
        folders: the run folders of other tasks.
        own: this run's folder.
        task: this run's task.
        examples: this run's examples.
        options: this run's method, with what decides its importance.

    Raises:
        DataError: a folder is this run's own, or has no result or none of its importance; or its result is of the same
            task, of one that another folder has, by another method, or found on some of the same examples.
    """
    found: dict[str, FoundImportance] = {}
    for folder in folders:
        if folder.resolve() == own.resolve():
            raise DataError(f"--against names {folder}, the folder of this run (--out); name runs of other tasks")
        one = _read_importance(folder, examples, options)
        if one.task == task.name:
            raise DataError(f"{folder} is a run of the same task, {task.name!r}; name runs of other tasks in --against")
        if one.task in found:
            raise DataError(
                f"{found[one.task].folder} and {folder} are runs of the same task, {one.task!r}; name one of them in "
                "--against"
            )
        found[one.task] = one
    return list(found.values())


def _read_importance(folder: Path, examples: Sequence[Example], options: AttributionOptions) -> FoundImportance:
    """The importance in a run folder, by the given method and found on none of the given examples."""
    result = read_json(folder / RESULT)
    if isinstance(result, dict) and "bank" in result and not result.keys() >= {"options", "examples"}:
        raise DataError(
            f"{folder} holds the result of an older version, without its importance; run its `hones attribute` again "
            "with the same arguments, which adds it and computes nothing again"
        )
    try:
        task, model = str(result["task"]), ModelIdentity.from_json(result["model"])
        method, seen = {"method": result["method"], **result["options"]}, set(result["examples"])
    except (KeyError, TypeError, ValueError, ProfileError) as error:
        raise _no_result(folder) from error
    comparable = options.comparable
    for name in {**comparable, **method}:
        theirs, ours = method.get(name), comparable.get(name)
        if theirs != ours:
            what = "methods" if name == "method" else "options"
            raise DataError(
                f"{folder} was found with {name} {theirs!r} and this run has {ours!r}; importances of different {what} "
                "cannot be compared: use the same for all tasks"
            )
    if shared := [example.id for example in examples if fingerprint(example) in seen]:
        raise DataError(
            f"{len(shared)} of the {len(examples)} examples in --data are those of {folder} as well (the first has the "
            f"id {shared[0]!r}: same image, prompt and targets); give each task examples of its own"
        )
    values = read_arrays(folder / IMPORTANCE).get("importance")
    if values is None or values.dtype != np.float32 or values.ndim != 1 or not np.isfinite(values).all():
        raise _no_importance(folder, model.num_neurons)
    return FoundImportance(folder, task, values, model)


def _no_importance(folder: Path, count: int) -> DataError:
    return DataError(
        f"{folder / IMPORTANCE} is damaged (it holds no importance, float32 [{count}]); run its `hones attribute` "
        "again with the same arguments, which writes it anew"
    )


def _no_result(folder: Path) -> DataError:
    return DataError(f"{folder / RESULT} is no result of `hones attribute`; run it again")
