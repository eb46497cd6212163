"""Kill attribution and learning with SIGKILL at random points, again and again, and compare what they end in.

    python killed_run.py FOLDER KILLS SEED

Run as a process of its own by `test_resume.py`: every attempt is a fork of it, so that the model is built once. Prints
one line of JSON: how many runs were killed how often and in what state, and the files that differ from those of a run
that was left alone.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from hones_offline import attribute, fit
from problems import Problem, problem

from hones_steer import save_profile

CHUNK = 3  # optimizer steps between two states, so that a short run has many


def run(p: Problem, folder: Path) -> None:
    """Attribute and learn in `folder`, as `hones attribute` and `hones fit` do."""
    found = attribute(
        p.model,
        p.processor,
        p.task,
        p.examples,
        method="hones",
        top_heads=6,
        top_fraction=0.05,
        head_metric="logprob",
        batch_size=4,
        run_dir=folder / "attribution",
    )
    settings = {"epochs": 8, "lr": 1e-2, "batch_size": 2, "accumulation_steps": 1}
    profile = fit(p.model, p.processor, p.task, p.examples, found.bank, run_dir=folder / "fit", **settings)
    save_profile(profile, folder / "profile.safetensors")


def attempt(p: Problem, folder: Path, kill_after: float | None) -> bool:
    """Run in a fork of this process that is killed after so many seconds; returns whether it finished before."""
    child = os.fork()
    if child == 0:
        run(p, folder)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run failed with exit code {code}")
    return code == 0


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def main() -> None:
    """Run, kill and compare, and print the result."""
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    importlib.import_module("hones_offline.learning.factors").CHUNK = CHUNK
    torch.set_num_threads(1)
    p = problem("llava", "vqa", count=6)

    start = time.monotonic()
    attempt(p, folder / "alone", None)
    seconds = time.monotonic() - start
    expected = contents(folder / "alone")

    rng = random.Random(seed)
    killed, states, differing = 0, [], []
    finished_runs = 0
    while killed < kills:
        place = folder / f"killed-{finished_runs}"
        (place).mkdir()
        while not attempt(p, place, rng.uniform(0, seconds) if killed < kills else None):
            killed += 1
            states.append(len(contents(place)))
        finished_runs += 1
        for left in place.glob(".hones-*.tmp"):  # of a kill while the profile was written: docs/profile-format.md
            left.unlink()
        found = contents(place)
        differing += [
            f"{place.name}/{name}" for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        ]
    print(
        json.dumps(
            {"killed": killed, "runs": finished_runs, "states": states, "files": len(expected), "differing": differing}
        )
    )


if __name__ == "__main__":
    main()
