"""Run folders: a step is computed once, other settings are refused, and a file is whole or not there."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hones_offline.running.prompts import prepare
from hones_offline.running.run_folder import (
    RunFolder,
    check_seed,
    read_arrays,
    read_json,
    run_settings,
)
from problems import problem

from hones_steer.errors import DataError
from hones_steer.files import write_atomically

SETTINGS = {"stage": "test", "seed": 1, "model": {"name": "", "sketch": (1.0, 2.0)}}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def must_not_run():
    raise AssertionError("a step that was done before was computed again")


def test_a_step_is_computed_once_and_then_read(tmp_path):
    run = RunFolder(tmp_path / "a" / "run", SETTINGS)
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3).T, "y": np.array([1, 2], dtype=np.int32)}
    assert run.json("one", lambda: {"value": 0.1, "list": [1, None]}) == {"value": 0.1, "list": [1, None]}
    first = run.arrays("two", lambda: arrays)
    before = contents(tmp_path)
    again = RunFolder(tmp_path / "a" / "run", SETTINGS)
    assert again.json("one", must_not_run) == {"value": 0.1, "list": [1, None]}
    second = again.arrays("two", must_not_run)
    for name, value in arrays.items():
        for result in (first, second):
            np.testing.assert_array_equal(result[name], value)
            assert result[name].dtype == value.dtype
    assert contents(tmp_path) == before
    assert set(before) == {"a/run/run.json", "a/run/one.json", "a/run/two.safetensors"}


def test_a_fresh_result_is_what_a_later_run_reads(tmp_path):
    """A tuple becomes a list at once, not only after a resumed run has read it."""
    assert RunFolder(tmp_path, SETTINGS).json("one", lambda: (1, 2)) == [1, 2]


def test_a_step_that_fails_leaves_no_file(tmp_path):
    run = RunFolder(tmp_path, SETTINGS)
    before = contents(tmp_path)
    with pytest.raises(ZeroDivisionError):
        run.json("one", lambda: 1 / 0)
    with pytest.raises(ValueError, match="Out of range float values"):
        run.json("two", lambda: float("nan"))
    assert contents(tmp_path) == before


def test_other_settings_are_refused_naming_every_difference(tmp_path):
    RunFolder(tmp_path, SETTINGS)
    before = contents(tmp_path)
    with pytest.raises(DataError) as caught:
        RunFolder(tmp_path, {"stage": "test", "seed": 2, "model": SETTINGS["model"], "lr": 0.1})
    message = str(caught.value)
    assert "holds a run with other settings: lr was None and now is 0.1; seed was 1 and now is 2; " in message
    assert "model" not in message
    assert message.endswith("use the same settings to resume it, or another folder")
    assert contents(tmp_path) == before


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="is not empty and holds no run; choose another folder"):
        RunFolder(tmp_path, SETTINGS)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    file = tmp_path / "run"
    file.write_text("x")
    for path in (file, file / "below"):
        with pytest.raises(DataError, match=r"run\.json: cannot be written: "):
            RunFolder(path, SETTINGS)
    assert contents(tmp_path) == {"run": b"x"}


def test_what_a_killed_write_left_is_cleared_away(tmp_path):
    (tmp_path / ".hones-0123456789abcdef.tmp").write_bytes(b"half a")
    RunFolder(tmp_path, SETTINGS)
    assert set(contents(tmp_path)) == {"run.json"}
    (tmp_path / ".hones-0123456789abcdef.tmp").write_bytes(b"half a")
    with pytest.raises(DataError, match="other settings"):
        RunFolder(tmp_path, {})
    assert len(contents(tmp_path)) == 2  # not this run's to touch
    RunFolder(tmp_path, SETTINGS)
    assert set(contents(tmp_path)) == {"run.json"}


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"a": 1}x'])
def test_a_damaged_result_is_named(tmp_path, damage):
    run = RunFolder(tmp_path, SETTINGS)
    for file in (tmp_path / "one.json", tmp_path / "two.safetensors"):
        file.write_bytes(damage)
    with pytest.raises(DataError, match=r"one\.json is damaged \(.*\); delete it and run again"):
        run.json("one", must_not_run)
    with pytest.raises(DataError, match=r"two\.safetensors is damaged \(.*\); delete it and run again"):
        run.arrays("two", must_not_run)


def test_a_cut_result_is_named(tmp_path):
    run = RunFolder(tmp_path, SETTINGS)
    run.arrays("two", lambda: {"x": np.zeros(100)})
    file = tmp_path / "two.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"two\.safetensors is damaged"):
        run.arrays("two", must_not_run)


@pytest.mark.parametrize("damage", ["{", "[1, 2]", "null"])
def test_damaged_settings_are_named(tmp_path, damage):
    (tmp_path / "run.json").write_text(damage)
    with pytest.raises(DataError, match=r"run\.json is damaged"):
        RunFolder(tmp_path, SETTINGS)


def test_a_missing_result_is_named(tmp_path):
    for read in (read_json, read_arrays):
        with pytest.raises(DataError, match="nothing is missing; the run that should have written it is not finished"):
            read(tmp_path / "nothing")


def in_subprocess(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


KILLED = """
import os, signal, sys
from pathlib import Path
from hones_offline.running.run_folder import RunFolder
from hones_steer.files import write_atomically
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
run = RunFolder(sys.argv[1], {"seed": 1})
run.json("first", lambda: 1)
Path.replace = kill
if os.fork() == 0:
    run.json("second", lambda: 2)
os.wait()
write_atomically(Path(sys.argv[1], "result.json"), b"new")
"""


def test_a_kill_between_writing_and_renaming_loses_that_write_only(tmp_path):
    RunFolder(tmp_path, {"seed": 1})
    write_atomically(tmp_path / "result.json", b"old")
    assert in_subprocess(KILLED, tmp_path).returncode == -signal.SIGKILL
    names = sorted(contents(tmp_path))
    assert [name.startswith(".hones-") for name in names[:2]] == [True, True]
    assert names[2:] == ["first.json", "result.json", "run.json"]
    assert (tmp_path / "result.json").read_bytes() == b"old"
    run = RunFolder(tmp_path, {"seed": 1})
    assert run.json("first", must_not_run) == 1
    assert run.json("second", lambda: 2) == 2
    assert set(contents(tmp_path)) == {"first.json", "result.json", "run.json", "second.json"}


def test_settings_know_what_is_asked_and_of_which_weights():
    """A task of the same name with another prompt, or weights of another type, is another run."""
    p = problem("llama", "text")
    plain = run_settings(prepare(p.model, p.processor, p.task, p.examples))
    assert json.loads(json.dumps(plain)) is not None

    class Louder(type(p.task)):
        def prompt(self, example):
            return example.prompt + " Answer"

    louder = run_settings(prepare(p.model, p.processor, Louder("text", "bleu4", 6), p.examples))
    assert {name for name in plain if plain[name] != louder[name]} == {"prompts"}
    longer = run_settings(prepare(p.model, p.processor, type(p.task)("text", "bleu4", 7), p.examples))
    assert {name for name in plain if plain[name] != longer[name]} == {"max_new_tokens"}
    fewer = run_settings(prepare(p.model, p.processor, p.task, p.examples[:-1]))
    assert {name for name in plain if plain[name] != fewer[name]} == {"examples", "prompts"}
    half = run_settings(prepare(p.model.bfloat16(), p.processor, p.task, p.examples))
    assert half["dtype"] == "bfloat16"


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(DataError, match="seed must lie in"):
        check_seed(seed)
