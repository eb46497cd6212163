"""Settings of how a computation is run, apart from what it computes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt

from hones_offline.running.distributed import ALONE, Processes
from hones_offline.running.run_folder import Arrays, RunFolder
from hones_steer.errors import DataError


@dataclass(frozen=True)
class Execution:
    """Batch size and memory, the processes that share the work, where steps are kept, and whether progress is shown.

    Another batch size or memory limit groups sequences differently, which changes the last bits of floating-point
    results, so both are among the settings of a run folder. Processes and progress change nothing.

    Raises:
        DataError: the batch size or the memory limit is out of range.
    """

    batch_size: int = 16
    """Sequences run at a time."""
    memory_gb: float = 4.0
    """GiB for the states that are kept to resume forwards from, for each of two KV caches, and for what a forward keeps
    for its backward pass."""
    processes: Processes = ALONE
    folder: RunFolder | None = None
    """Where the results of steps are kept; None keeps none."""
    progress: bool = False
    """Show progress bars on a terminal, those of the first process."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"batch_size must be at least 1, not {self.batch_size}")
        if not 0 < self.memory_gb < math.inf:
            raise DataError(f"memory_gb must be positive, not {self.memory_gb}")

    @property
    def shows_progress(self) -> bool:
        """Whether this process shows progress bars."""
        return self.progress and self.processes.rank == 0

    def arrays(self, step: str, compute: Callable[[], Arrays]) -> dict[str, npt.NDArray[Any]]:
        """The named arrays of a step: read if the run folder holds them, else computed, and kept if there is one."""
        return dict(compute()) if self.folder is None else self.folder.arrays(step, compute)

    def step_of_first(self, step: str, compute: Callable[["Execution"], Arrays]) -> dict[str, npt.NDArray[Any]]:
        """`arrays` of a step that the first process computes alone, for every process.

        `compute` is given this execution without the other processes.
        """
        alone = replace(self, processes=ALONE)
        return self.processes.from_first(lambda: alone.arrays(step, lambda: compute(alone)))

    def shared_step(self, step: str, compute: Callable[["Execution"], Arrays]) -> dict[str, npt.NDArray[Any]]:
        """`arrays` of a step that all processes call together, for every process.

        `compute` divides the work among them itself, and gives each the whole.
        """
        kept = self.processes.from_first(lambda: self.folder is not None and self.folder.holds(step))
        values = {} if kept else compute(self)
        return self.processes.from_first(lambda: self.arrays(step, lambda: values))
