"""Run folders: each step's result is one file, written atomically, so that a killed run resumes where it stopped.

A step is a function of the run's settings only. Its file exists whole or not at all. Running again computes only the
missing steps, and the files have the bytes of a run that was never interrupted.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hones_offline.data.examples import Example
from hones_offline.running.prompts import Prepared
from hones_steer.errors import DataError
from hones_steer.files import is_leftover, write_atomically
from hones_steer.profile import ModelIdentity
from hones_steer.strict_json import parse_json

_MISSING = "{file} is missing; the run that should have written it is not finished"

Arrays = Mapping[str, npt.NDArray[Any]]


class RunFolder:
    """A folder of step results that belong to one set of settings (JSON), which `run.json` holds.

    Raises:
        DataError: the folder holds a run with other settings, which the message names, or files that are no run.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        settings = json.loads(json.dumps(settings))
        file = self.path / "run.json"
        if file.exists():
            _check_settings(file, settings)
        elif self.path.is_dir() and any(not is_leftover(entry) for entry in self.path.iterdir()):
            raise DataError(f"{self.path} is not empty and holds no run; choose another folder")
        else:
            write_atomically(file, json_bytes(settings))
        for entry in self.path.iterdir():
            if is_leftover(entry):
                entry.unlink(missing_ok=True)

    def holds(self, name: str) -> bool:
        """Whether the folder has the arrays of step `name`."""
        return (self.path / f"{name}.safetensors").exists()

    def json(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of step `name`, a JSON value: read if its file exists, else computed and written."""
        file = self.path / f"{name}.json"
        if not file.exists():
            write_atomically(file, json_bytes(compute()))
        return read_json(file)

    def arrays(self, name: str, compute: Callable[[], Arrays]) -> dict[str, npt.NDArray[Any]]:
        """The result of step `name`, named arrays: read if its file exists, else computed and written."""
        file = self.path / f"{name}.safetensors"
        if not self.holds(name):
            write_atomically(file, save({k: np.ascontiguousarray(v) for k, v in compute().items()}))
        return read_arrays(file)


@contextmanager
def resumable() -> Iterator[None]:
    """A block whose steps a run folder keeps: an interrupt gets a note for the command line that it can be resumed."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note("run the same command again to resume")
        raise


def read_arrays(file: Path) -> dict[str, npt.NDArray[Any]]:
    """Read named arrays from a safetensors file.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        return load(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(_MISSING.format(file=file)) from error
    except SafetensorError as error:
        raise DataError(f"{file} is damaged ({error}); delete it and run again") from error


def read_json(file: Path) -> Any:
    """Read a JSON value from a file; raises DataError if the file is missing or damaged."""
    try:
        return parse_json(file.read_bytes(), allow_nan=True)
    except FileNotFoundError as error:
        raise DataError(_MISSING.format(file=file)) from error
    except ValueError as error:
        raise DataError(f"{file} is damaged (it {error}); delete it and run again") from error


def _check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Raise DataError, naming what differs, unless the file holds these settings."""
    before = read_json(file)
    if not isinstance(before, dict):
        raise DataError(f"{file} is damaged (no JSON object); delete its folder and run again")
    if before != settings:
        names = [
            f"{name} was {before.get(name)!r} and now is {settings.get(name)!r}"
            for name in sorted(before.keys() | settings.keys())
            if before.get(name) != settings.get(name)
        ]
        raise DataError(
            f"{file.parent} holds a run with other settings: {'; '.join(names)}; "
            "use the same settings to resume it, or another folder"
        )


def json_bytes(value: Any) -> bytes:
    """Encode a value as indented JSON with sorted keys; raises ValueError if it holds NaN or an infinity."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def step_name(kind: str, decisive: Any) -> str:
    """The name of a step: its kind, and 16 hex digits that stand for everything (JSON) that decides its result."""
    return f"{kind}-{hashlib.sha256(json_bytes(decisive)).hexdigest()[:16]}"


def run_settings(prepared: Prepared) -> dict[str, Any]:
    """Settings for `RunFolder`: everything about a model, its task and its examples that decides a result's bytes."""
    task = prepared.task
    random = np.random.default_rng(0)  # an epoch's draw stands for them all
    asked = [
        [task.prompts(e), task.opening(e), task.answers(e), task.drawn_answers(e, random), task.target_texts(e)]
        for e in prepared.examples
    ]
    return {
        "task": task.name,
        "metric": task.metric,
        "max_new_tokens": task.max_new_tokens,
        "first_line": task.first_line,
        "protocol": task.protocol,
        # A task may draw prompts by NumPy's integers, which JSON does not know.
        "prompts": hashlib.sha256(json.dumps(asked, default=int).encode()).hexdigest()[:12],
        "examples": examples_digest(prepared.examples),
        "model": ModelIdentity.from_model(prepared.decoder.model).to_json(),
        "dtype": str(next(prepared.decoder.model.parameters()).dtype).removeprefix("torch."),
        "device": prepared.decoder.device.type,
    }


def check_seed(seed: int) -> None:
    """Raise DataError if NumPy or PyTorch would refuse the seed."""
    if not 0 <= seed < 2**32:
        raise DataError(f"seed must lie in [0, 2**32), not {seed}")


def examples_digest(examples: Sequence[Example]) -> str:
    """Digest of the examples' content, 12 hex digits; an image counts by its key and box."""
    digest = hashlib.sha256()
    for e in examples:
        image = [e.image.key, getattr(e.image, "box", None)] if e.image else None
        digest.update(json.dumps([e.id, e.prompt, e.targets, e.candidates, image]).encode() + b"\n")
    return digest.hexdigest()[:12]
