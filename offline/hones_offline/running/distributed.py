"""Several processes that share one attribution, each with a whole model: `torchrun` or `accelerate launch` starts them.

The work falls into units, and each unit belongs to one process. What crosses between processes are arrays of results,
megabytes per batch, through gloo whatever the device. Results are put together in the units' order, so that they have
the bytes that one process would have found. docs/scaling.md has the commands and the arithmetic.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from hones_offline.data.metrics import FloatArray
from hones_offline.running.prompts import Prepared
from hones_offline.running.run_folder import RunFolder
from hones_steer.errors import DataError, HonesError, StateError

T = TypeVar("T")

TIMEOUT = timedelta(hours=6)
"""For a machine that vanished (a process that ended is noticed at once); more than processes wait for one another."""
UNITS_EACH = 4
"""Batches are split until each process has as many units, so that few batches keep many processes busy."""


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `size`. Methods that exchange something are called by all processes, in the same order.

    Raises:
        StateError: another process has ended or cannot be reached.
    """

    rank: int
    size: int

    def owns(self, unit: int) -> bool:
        """Whether this process does a unit of work."""
        return unit % self.size == self.rank

    def parts(self, batches: int, most: int) -> int:
        """Into how many parts each batch is split; every part begins with the same undisturbed forward."""
        return 1 if self.size == 1 else min(most, -(-UNITS_EACH * self.size // batches))

    def share(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _contact():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, compute: Callable[[], T]) -> T:
        """What `compute` gives in the first process; the others do not call it."""
        value: list[Any] = [compute() if self.rank == 0 else None]
        if self.size > 1:
            with _contact():
                dist.broadcast_object_list(value, src=0)
        result: T = value[0]
        return result

    def sum(self, units: Sequence[Callable[[], FloatArray]], shape: tuple[int, ...]) -> FloatArray:
        """Σ of what the units give, float64 of `shape`, added in the units' order; each is computed by one process."""
        total, other = np.zeros(shape), np.empty(shape)
        for start in range(0, len(units), self.size):
            some = units[start : start + self.size]
            own = some[self.rank]() if self.rank < len(some) else other
            for owner in range(len(some)):
                part = own if owner == self.rank else other
                if self.size > 1:
                    with _contact():
                        dist.broadcast(torch.from_numpy(part), src=owner)
                total += part
        return total


ALONE = Processes(0, 1)


@contextmanager
def _contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo raises when a connection closes or times out
        raise StateError(
            "lost contact with another process, which has ended or cannot be reached (its own message says why); "
            "start all of them again; what a run folder already holds is not computed again"
        ) from error


def number_of_processes() -> int:
    """How many processes torchrun or accelerate has started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes that torchrun or accelerate has started, connected while the block runs; errors name the process.

    Raises:
        StateError: they cannot reach one another.
    """
    size = number_of_processes()
    if size == 1:
        yield ALONE
        return
    try:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:  # unreachable; a variable of the launcher's is missing
        reason = str(error).splitlines()[0]
        raise StateError(f"{size} processes cannot find one another ({reason}); start them with torchrun") from error
    rank = dist.get_rank()
    try:
        yield Processes(rank, size)
    except HonesError as error:
        raise type(error)(f"process {rank} of {size}: {error}") from error
    finally:
        dist.destroy_process_group()


def own_device(name: str) -> str:
    """Of a `--device`, what this process uses: its own GPU for "auto" and "cuda" where several were started.

    Raises:
        DataError: more processes than GPUs were started on this machine.
    """
    if number_of_processes() == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= there:
        raise DataError(
            f"process {local + 1} of this machine has no GPU, there are {there}; start at most {there} here"
        )
    return f"cuda:{local}"


def usable_everywhere(prepared: Prepared, max_failures: float, processes: Processes) -> Prepared:
    """`prepared` without the examples that some process could not use, so that all have the same; these are failures.

    Raises:
        DataError: these are more than `max_failures` of the examples.
    """
    failures: dict[str, str] = {}
    for rank, own in enumerate(processes.share(prepared.failures)):
        for name, reason in own.items():
            failures.setdefault(name, reason if name in prepared.failures else f"process {rank}: {reason}")
    failed, total = len(failures), len(prepared) + len(prepared.failures)
    if failed > max_failures * total:
        name, reason = next(iter(failures.items()))
        raise DataError(
            f"task {prepared.task.name!r}: {failed} of {total} examples cannot be used by every process, more than "
            f"max_failures={max_failures:g} allows; the first is {name!r}: {reason}"
        )
    kept = prepared.only(i for i, example in enumerate(prepared.examples) if example.id not in failures)
    return replace(kept, failures=failures)


def open_run(path: str | Path | None, settings: Mapping[str, Any], processes: Processes) -> RunFolder | None:
    """The run folder that all processes write to; None without a path.

    Raises:
        DataError: processes have different data or models, do not see one folder, or it holds another run.
    """
    for rank, other in enumerate(processes.share(dict(settings))):
        differing = [name for name in settings if settings[name] != other[name]]
        if differing:
            raise DataError(
                f"process {rank} works on other {', '.join(differing)} than this one; give all the same files"
            )
    if path is None:
        return None
    run = processes.from_first(lambda: RunFolder(path, settings))  # which clears leftovers: once, before anyone writes
    if not run.path.joinpath("run.json").exists():
        raise DataError(f"{path} is not the folder that process 0 has; name one that all machines share")
    return run
