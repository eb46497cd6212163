"""Attribution in several processes, which are forks of this one, so that the model is built once.

    python several_processes.py FOLDER

Run as a process of its own by `test_distributed.py`. Prints one line of JSON: for each scenario the processes' exit
codes and error messages.
"""

import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import reference
import torch
from hones_offline import attribute
from hones_offline.running.distributed import Processes, launched
from offline.killed_run import contents
from problems import Problem, problem

from hones_steer.errors import DataError, HonesError

HONES = {"method": "hones", "top_heads": 4}
METHODS = ("fisher", "head_grad", "grad_act", "ap")


class Unreadable:
    """An image that raises when it is loaded."""

    def __init__(self, key: str) -> None:
        self.key = key

    def load(self) -> Any:
        """Raise the error of a damaged file."""
        raise DataError("damaged")


def run(p: Problem, folder: Path, processes: Processes, **options: Any) -> None:
    """Attribute in `folder`, and write beside it the result that this process was given."""
    found = attribute(
        p.model,
        p.processor,
        p.task,
        p.examples,
        top_fraction=0.05,
        batch_size=2,
        run_dir=folder,
        max_failures=0.2,
        processes=processes,
        **{"head_metric": "logprob", **(options if "method" in options else {**HONES, **options})},
    )
    name = f"{folder.name}-of-{processes.rank}.npz"
    np.savez(folder.parent / name, found.head_scores, found.importance, np.array([found.n, found.base]))
    folder.with_name(f"{name}.json").write_text(json.dumps(found.failures))


def kill_after(steps: int) -> None:
    """Make this process kill itself after it has written so many files."""
    runs = importlib.import_module("hones_offline.running.run_folder")
    write, written = runs.write_atomically, []

    def writing(file: Path, data: bytes) -> None:
        write(file, data)
        written.append(file)
        if len(written) == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    runs.write_atomically = writing


def together(size: int, work: Callable[[Processes], None], log: Path) -> list[tuple[int, str]]:
    """Run `work` in so many processes, and return the exit code and error message of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [_start(rank, size, port, work, log / str(rank)) for rank in range(size)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [(code, (log / str(rank)).read_text()) for rank, code in enumerate(codes)]


def _start(rank: int, size: int, port: int, work: Callable[[Processes], None], log: Path) -> int:
    log.parent.mkdir(exist_ok=True)
    log.write_text("")
    child = os.fork()
    if child:
        return child
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    try:
        with launched() as processes:
            work(processes)
    except HonesError as error:
        log.write_text(f"{type(error).__name__}: {error}")
        os._exit(2)
    os._exit(0)


def writes_its_targets(p: Problem) -> Problem:
    """The problem with the model's own answers as targets, so that a replaced head can only make it worse."""
    texts = reference.outputs(p.model, p.processor, p.task, p.examples)
    return replace(p, examples=[replace(e, targets=(text,)) for e, text in zip(p.examples, texts, strict=True)])


def main() -> None:
    """Run the scenarios and print how each process ended."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    p = writes_its_targets(problem("llava", "ocr", count=6))
    damaged = replace(p, examples=[*p.examples[:-1], replace(p.examples[-1], image=Unreadable("random-5"))])
    changed = replace(p, examples=[replace(p.examples[0], targets=("small",)), *p.examples[1:]])

    def attributed(
        name: str, size: int, p: Problem, of_rank_1: Mapping[str, Any] = MappingProxyType({}), **options: Any
    ) -> Any:
        """Attribute in `size` processes; process 1 may have another problem, be killed after some files or fail."""

        def work(processes: Processes) -> None:
            changes = of_rank_1 if processes.rank == 1 else {}
            if "kill_after" in changes:
                kill_after(changes["kill_after"])
            if "fail" in changes:
                raise DataError(changes["fail"])
            run(changes.get("problem", p), folder / name, processes, **options)

        return together(size, work, folder / "log")

    outcome = {
        "alone": attributed("alone", 1, p),
        "two": attributed("two", 2, p),
        "alone-task": attributed("alone-task", 1, p, head_metric="task"),
        "three-task": attributed("three-task", 3, p, head_metric="task"),
        "alone-patch": attributed("alone-patch", 1, p, heads="patch"),
        "three-patch": attributed("three-patch", 3, p, heads="patch"),
        **{f"alone-{method}": attributed(f"alone-{method}", 1, p, method=method) for method in METHODS},
        **{f"three-{method}": attributed(f"three-{method}", 3, p, method=method) for method in METHODS},
        "alone-damaged": attributed("alone-damaged", 1, damaged),
        "damaged": attributed("damaged", 2, p, {"problem": damaged}),
        "changed": attributed("changed", 2, p, {"problem": changed}),
        "failing": attributed("failing", 2, p, {"fail": "nothing to read"}),
        "killed": attributed("killed", 2, p, {"kill_after": 2}),
        "files": len(contents(folder / "killed")),
        "resumed": attributed("killed", 3, p),
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
