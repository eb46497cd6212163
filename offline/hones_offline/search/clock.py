"""The time that a search may take, over all the runs that went on with it, and how much of it a trial takes."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hones_offline.running.run_folder import json_bytes, read_json
from hones_steer.errors import DataError
from hones_steer.files import write_atomically

now = time.monotonic
WORK = "work"
"""Where a search keeps its steps, below its folder."""
_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """The seconds of a duration such as "90s", "20m", "1.5h" or "1h30m"; raises DataError for any other text."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    if not parts or "".join(map("".join, parts)) != text:
        raise DataError(f"the budget {text!r} is no duration; write a number and a unit, such as 90s, 20m or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def duration(seconds: float) -> str:
    """A duration for people: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Clock:
    """The time that a search has taken: what earlier runs wrote into its folder, and the time since this was made.

    It decides whether another trial is begun and nothing else, so that results do not depend on it.
    """

    def __init__(self, folder: Path, budget: float | None) -> None:
        """Begin with what the file in a search's folder says, if there is one; `budget` is in seconds, None no limit.

        Raises:
            DataError: the budget is not positive, or the file is damaged.
        """
        if budget is not None and not 0 < budget < float("inf"):
            raise DataError(f"the budget must be positive, not {budget:g} seconds")
        self.folder, self.budget, self._begun = folder, budget, now()
        self._file = folder / WORK / "clock.json"
        kept = read_json(self._file) if self._file.exists() else {}
        try:
            self._before = float(kept.get("seconds", 0.0))
            self.trials = int(kept.get("trials", 0))
            self._in_trials = float(kept.get("in_trials", 0.0))
            self._estimate, self._measuring = (float(kept.get(name, 0.0)) for name in ("estimate", "measuring"))
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(f"{self._file} is damaged ({error}); delete it and run again") from error

    @property
    def spent(self) -> float:
        """Seconds that the search has taken."""
        return self._before + now() - self._begun

    @property
    def per_trial(self) -> float:
        """Seconds that a trial takes: the mean of those that were made, or the estimate before there is any."""
        return self._in_trials / self.trials if self.trials else self._estimate

    def expect(self, per_trial: float, measuring: float) -> None:
        """Take estimates of the seconds that a trial, and what is measured at the end, will take."""
        self._estimate, self._measuring = per_trial, measuring

    def allows_another(self) -> bool:
        """Whether the budget has room for another trial, and for what is measured at the end."""
        return self.budget is None or self.spent + self.per_trial + self._measuring <= self.budget

    def left(self, trials: int) -> float:
        """Seconds until the search ends, if so many trials are left to make; the budget may not allow them all."""
        rest = trials * self.per_trial + self._measuring
        return rest if self.budget is None else max(0.0, min(rest, self.budget - self.spent))

    def require_one(self) -> None:
        """Raise DataError if the budget has no room for a single trial."""
        if self.budget is not None and not self.allows_another():
            raise DataError(
                f"a budget of {duration(self.budget)} is too small for one trial, which takes about "
                f"{duration(self.per_trial)} here, with {duration(self.spent)} gone already and "
                f"{duration(self._measuring)} to measure in the end; give more, or fewer examples or epochs"
            )

    @contextmanager
    def trial(self) -> Iterator[None]:
        """A block that makes a trial; the time it took is written into the folder, also when it is interrupted."""
        begun = now()
        try:
            yield
            self.trials += 1
            self._in_trials += now() - begun
        finally:
            state = {"seconds": self.spent, "trials": self.trials, "in_trials": self._in_trials}
            state |= {"estimate": self._estimate, "measuring": self._measuring}
            write_atomically(self._file, json_bytes(state))
