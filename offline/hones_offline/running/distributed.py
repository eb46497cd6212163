"""Several processes that share one attribution, each with a whole model: `torchrun` or `accelerate launch` starts them.

The work is divided into units, and each unit belongs to one process. Processes exchange only arrays of results,
megabytes per batch, through gloo on every device. Results are combined in the units' order, so that they have the same
bytes as those of a single process. docs/scaling.md has the commands and the arithmetic.
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
"""Longest wait for another process, for a machine that vanished; a process that ended is noticed at once."""
UNITS_EACH = 4
"""Number of units per process that batches are split into, so that few batches keep many processes busy."""


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `size`. All processes call the methods that exchange something, and in the same order.

    Raises:
        StateError: another process has ended or cannot be reached.
    """

    rank: int
    size: int

    def owns(self, unit: int) -> bool:
        """Whether this process computes unit number `unit`."""
        return unit % self.size == self.rank

    def parts(self, batches: int, most: int) -> int:
        """Number of parts, at most `most`, of each batch; every part repeats the batch's undisturbed forward."""
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
        """The result of `compute` in the first process, for all; the others do not call it."""
        value: list[Any] = [compute() if self.rank == 0 else None]
        if self.size > 1:
            with _contact():
                dist.broadcast_object_list(value, src=0)
        result: T = value[0]
        return result

    def sum(self, units: Sequence[Callable[[], FloatArray]], shape: tuple[int, ...]) -> FloatArray:
        """Sum of the units' results, float64 of `shape`, added in the units' order; one process computes each unit."""
        total, received = np.zeros(shape), np.empty(shape)
        for start in range(0, len(units), self.size):
            round_of_units = units[start : start + self.size]  # at most one per process
            computed = round_of_units[self.rank]() if self.rank < len(round_of_units) else received
            for owner in range(len(round_of_units)):
                part = computed if owner == self.rank else received
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
    """Number of processes that torchrun or accelerate has started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def launched() -> Iterator[Processes]:
    """Connect the processes that torchrun or accelerate has started while the block runs; errors name the process.

    Raises:
        StateError: the processes cannot reach one another.
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
    """The device of this process, given `--device`: one GPU each for "auto" and "cuda" if several processes run.

    Raises:
        DataError: more processes than GPUs were started on this machine.
    """
    if number_of_processes() == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise DataError(f"process {local + 1} of this machine has no GPU, there are {gpus}; start at most {gpus} here")
    return f"cuda:{local}"


def usable_everywhere(prepared: Prepared, max_failures: float, processes: Processes) -> Prepared:
    """Leave out the examples that at least one process could not use, so that all processes have the same ones.

    The examples left out are in the result's `failures`.

    Raises:
        DataError: the failures are more than the share `max_failures` of the examples.
    """
    failures: dict[str, str] = {}
    for rank, failures_there in enumerate(processes.share(prepared.failures)):
        for name, reason in failures_there.items():
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
    """Open the run folder that all processes write to; None without a path.

    Raises:
        DataError: the processes have different data or models, do not see the same folder, or it holds another run.
    """
    for rank, settings_there in enumerate(processes.share(dict(settings))):
        differing = [name for name in settings if settings[name] != settings_there[name]]
        if differing:
            raise DataError(
                f"process {rank} works on other {', '.join(differing)} than this one; give all the same files"
            )
    if path is None:
        return None
    run = processes.from_first(lambda: RunFolder(path, settings))  # only once: it clears leftovers
    if not run.path.joinpath("run.json").exists():
        raise DataError(f"{path} is not the folder that process 0 has; name one that all machines share")
    return run
