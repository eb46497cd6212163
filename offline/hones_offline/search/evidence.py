"""Evidence for the winner of a search: the test examples, with a note of each use of them, and other tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hones_offline.comparison.splits import Splits
from hones_offline.data.examples import fingerprint
from hones_offline.data.metrics import CrossedBootstrap, FloatArray, interval_of
from hones_offline.running.prompts import Prepared
from hones_offline.running.run_folder import read_json
from hones_offline.search.clock import WORK
from hones_steer.errors import DataError
from hones_steer.profile import ModelIdentity, Profile

_TESTED = "tested-"


def evidence(splits: Splits, others: Sequence[Prepared], profile: Profile) -> dict[str, Any]:
    """Score the test examples and those of other tasks, without the profile and with it; the profile's evidence.

    Beside the evidence of `Scores.evidence` it has "others", the same for each other task, and "others_mean", the mean
    of their gains, where there are any; and "test_used_before", the profiles that these test examples were scored with
    before, where there are any (see `used_before`).
    """
    before = used_before(splits, profile)
    base, steered = splits.measure("test"), splits.measure("test", steering=profile)
    found = steered.evidence(base, "test")
    if others:
        found |= _others(splits, others, profile)
    return found | ({"test_used_before": before} if before else {})


def used_before(splits: Splits, profile: Profile) -> list[str]:
    """The short digests of the profiles that this model was scored with on some of the same test examples before.

    The note of it is taken before the examples are scored, as a step of the run folder. Notes of runs in this folder
    and in those beside it are found; others cannot be.

    Raises:
        DataError: a note is damaged.
    """
    test, model = splits.test, ModelIdentity.from_model(splits.test.decoder.model).to_json()
    own = f"{_TESTED}{profile.digest[:16]}"
    examples = sorted({fingerprint(example) for example in test.examples})

    def note() -> dict[str, Any]:
        beside = splits.path.resolve().parents[1]  # the folder that holds this search's
        notes = [_read(file) for file in sorted(beside.glob(f"*/{WORK}/{_TESTED}*.json"))]
        same = [one for one in notes if one["model"] == model and not set(examples).isdisjoint(one["examples"])]
        before = list(dict.fromkeys(one["profile"] for one in same))
        return {"profile": profile.short_digest, "model": model, "examples": examples, "before": before}

    before: list[str] = splits.run.json(own, note)["before"]
    return before


def _read(file: Path) -> dict[str, Any]:
    found = read_json(file)
    if not isinstance(found, dict) or not found.keys() >= {"profile", "model", "examples"}:
        raise DataError(f"{file} is damaged (no note of scored test examples); restore it, or delete it")
    return found


def _others(splits: Splits, others: Sequence[Prepared], profile: Profile) -> dict[str, Any]:
    """Other tasks without the profile and with it, and the mean of what they gain, which is mostly a loss."""
    bootstrap, rows, gains = CrossedBootstrap(), {}, []
    for prepared in others:
        base, steered = (splits.measure_beside(prepared, steering) for steering in (None, profile))
        values = [bootstrap.values(one.task.name, one.statistics, one.task.aggregate) for one in (base, steered)]
        gains.append(values[1] - values[0])
        row = {**steered.evidence(base, "others"), "gain_ci95": interval_of(gains[-1])}
        rows[prepared.task.name] = {key: value for key, value in row.items() if key != "split"}
    mean: FloatArray = np.mean(gains, axis=0)
    return {"others": rows, "others_mean": {"gain": float(mean[0]), "gain_ci95": interval_of(mean)}}
