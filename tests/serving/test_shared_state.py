"""State that several API servers agree on: the file in a folder, the registry that follows it, real processes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hones_serving import shared_state
from hones_serving.registry import CapacityError
from hones_serving.shared_registry import SharedRegistry, write_first_state
from hones_serving.shared_state import SharedState, SharedStateError, State, Stored, UnconfirmedError, write_state

from hones_steer import ModelIdentity, Profile, RoutingError, save_profile
from hones_steer.store import parse_expression

IDENTITY = ModelIdentity("", None, "llama", 2, 8, 32, (1.0,) * 16)
STATE = State(3, True, {"vqa": Stored("vqa.safetensors", b"\n{}\n"), "ocr": Stored("new/ocr.safetensors", b"")})


def profile(task: str, scale: float, **metadata: Any) -> Profile:
    layers = {1: (np.array([0, 5], np.int32), np.array([scale, 0.5], np.float32))}
    return Profile(task, layers, IDENTITY, **metadata)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for a state, without one."""
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path / "state"


@pytest.fixture
def profiles(tmp_path: Path, folder: Path) -> Path:
    """A folder of profiles, with which the state of `folder` begins; next/vqa.safetensors is another one for vqa."""
    (tmp_path / "profiles" / "next").mkdir(parents=True)
    first = {"vqa": profile("vqa", 2.0, description="for vqa"), "ocr": profile("ocr", 3.0)}
    for task, each in first.items():
        save_profile(each, tmp_path / "profiles" / f"{task}.safetensors")
    save_profile(profile("vqa", 9.0), tmp_path / "profiles" / "next" / "vqa.safetensors")
    write_first_state(folder, first)
    return tmp_path / "profiles"


def registry(
    folder: Path, profiles: Path, index: int = 0, count: int = 1, *, seconds: float = 60, max_profiles: int = 4
) -> SharedRegistry:
    shared = SharedState(folder, index, count, seconds=seconds)
    room = {"max_profiles": max_profiles, "always_enough": False}
    return SharedRegistry(shared, profiles, IDENTITY, listing="the list", **room)


def scale(known: SharedRegistry, text: str = "vqa") -> float:
    """The first scale of what an expression describes now, as a request would be admitted."""
    known.follow()
    resolved = known.resolve(parse_expression(text))
    assert resolved is not None
    return float(resolved.layers[1][1][0])


# The file -----------------------------------------------------------------------------------------


def test_a_state_is_read_once(folder: Path) -> None:
    write_state(folder, STATE)
    shared = SharedState(folder, 0, 1)
    assert shared.read() == STATE
    assert shared.read() is None
    write_state(folder, State(4, False, {}))
    assert shared.read() == State(4, False, {})
    shared.forget()
    assert shared.read() == State(4, False, {})


def test_a_file_with_the_number_of_the_one_before_is_still_another(folder: Path) -> None:
    """File systems give the number of a file that has gone to the next one; the one that was read last is kept open."""
    write_state(folder, STATE)
    shared = SharedState(folder, 0, 1)
    for version in range(4, 40):
        shared.read()
        write_state(folder, State(version - 1, False, {}))
        write_state(folder, State(version, True, {}))
        assert shared.read() == State(version, True, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-1], "does not fit what follows it"),
        (lambda data: data + b"x", "does not fit what follows it"),
        (lambda _: b"", "is not valid JSON"),
        (lambda data: data.replace(b'"format": 1', b'"format": 2'), "is not of format 1"),
        (lambda data: data.replace(b'"version": 3', b'"version": "3"'), "does not fit what follows it"),
        (lambda data: data.replace(b'"version": 3, ', b""), "lacks 'version'"),
        (lambda data: data.replace(b'"enabled": true', b'"enabled": 1'), "does not fit what follows it"),
        (lambda data: data.replace(b"true", b"true, true"), "is not valid JSON"),
    ],
)
def test_a_broken_state_is_none(folder: Path, change: Any, words: str) -> None:
    write_state(folder, STATE)
    (folder / "state").write_bytes(change((folder / "state").read_bytes()))
    with pytest.raises(SharedStateError, match=rf"{folder / 'state'}: .*{words}"):
        SharedState(folder, 0, 1).read()


def _link(folder: Path) -> None:
    (folder / "state").rename(folder / "elsewhere")
    (folder / "state").symlink_to("elsewhere")


def _fifo(folder: Path) -> None:
    (folder / "state").unlink()
    os.mkfifo(folder / "state")


def _large(folder: Path) -> None:
    with (folder / "state").open("ab") as file:
        file.truncate(shared_state.MAX_BYTES + 1)


def _open_to_others(folder: Path) -> None:
    write_state(folder, STATE)  # or nobody would look
    folder.chmod(0o750)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "state").unlink(), "No such file"),
        (_link, "Too many levels of symbolic links"),
        (_fifo, "no regular file"),
        (_large, "larger than 268,435,456 bytes"),
        (_open_to_others, "mode 750, but only this server's user"),
    ],
    ids=["gone", "symlink", "fifo", "too large", "open to others"],
)
def test_a_state_that_cannot_be_trusted_is_not_read(folder: Path, spoil: Any, words: str) -> None:
    write_state(folder, STATE)
    fresh, known = SharedState(folder, 0, 1), SharedState(folder, 1, 2)
    known.read()
    (folder / "state").touch()
    spoil(folder)
    for shared in (fresh, known):
        shared.forget()
        with pytest.raises(SharedStateError, match=words):
            shared.read()
    folder.chmod(0o700)
    (folder / "state").unlink(missing_ok=True)
    write_state(folder, STATE)
    assert fresh.read() == known.read() == STATE


def test_a_folder_that_others_can_enter_is_none(folder: Path) -> None:
    folder.chmod(0o755)
    with pytest.raises(SharedStateError, match=r"mode 755, but only this server's user \d+ may enter it \(mode 700\)"):
        SharedState(folder, 0, 1)
    folder.chmod(0o700)
    (folder.parent / "link").symlink_to(folder)
    with pytest.raises(SharedStateError, match="is no folder"):
        SharedState(folder.parent / "link", 0, 1)
    with pytest.raises(SharedStateError, match="No such file"):
        SharedState(folder / "nowhere", 0, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_none(folder: Path) -> None:
    write_state(folder, STATE)
    shared = SharedState(folder, 0, 1)
    os.chown(folder / "state", 12345, -1)
    with pytest.raises(SharedStateError, match="no regular file of user 0"):
        shared.read()
    os.chown(folder, 12345, -1)
    with pytest.raises(SharedStateError, match="belongs to user 12345 with mode 700"):
        SharedState(folder, 0, 1)


def test_a_state_that_is_too_large_is_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(folder, STATE)
    monkeypatch.setattr(shared_state, "MAX_BYTES", 1000)
    with pytest.raises(SharedStateError, match="more than the 0 that several API servers share"):
        write_state(folder, State(4, True, {"vqa": Stored("vqa.safetensors", bytes(1000))}))
    assert SharedState(folder, 0, 1).read() == STATE


def test_one_changes_the_state_at_a_time(folder: Path) -> None:
    first, second = (SharedState(folder, index, 2, seconds=0.1) for index in range(2))
    for one, other in ((first, second), (second, first)):
        message = r"another change has not ended within 0\.1 s"
        with one.changing(), pytest.raises(SharedStateError, match=message), other.changing():
            pass


def test_who_has_not_confirmed_is_named(folder: Path) -> None:
    first, second, third = (SharedState(folder, index, 3, seconds=0) for index in range(3))
    first.confirm(7)
    second.confirm(6)
    with pytest.raises(UnconfirmedError) as caught:
        first.wait(7)
    assert f"API server 1 (process {os.getpid()}) has version 6; API server 2 has not started" in str(caught.value)
    third.confirm(8)
    second.confirm(6, "the disk is on fire")
    with pytest.raises(UnconfirmedError, match=r"\(process \d+\) cannot take it: the disk is on fire; none of them"):
        first.wait(7)
    second.confirm(7)
    first.wait(7)


# The registry -------------------------------------------------------------------------------------


def test_it_begins_with_what_the_folder_had(folder: Path, profiles: Path) -> None:
    (profiles / "vqa.safetensors").unlink()  # after the server's first process has read it
    known = registry(folder, profiles)
    assert (known.tasks(), known.enabled, scale(known)) == (["ocr", "vqa"], True, 2.0)
    assert known.profiles()[1] == {
        "name": "vqa",
        "digest": profile("vqa", 2.0).digest,
        "neurons": 2,
        "layers": 1,
        "description": "for vqa",
        "file": "vqa.safetensors",
    }
    assert known.about() == {"api_server": 0, "version": 1}


def test_a_change_holds_in_all_from_the_next_request_on(folder: Path, profiles: Path) -> None:
    """None of them ever confirms: what the others look for is in place before anybody waits for that."""
    first, second = (registry(folder, profiles, index, 2, seconds=0) for index in range(2))

    def unconfirmed(change: Callable[..., Any], *arguments: Any) -> None:
        with pytest.raises(UnconfirmedError, match="API server 0 has not started; API server 1 has not started"):
            change(*arguments)

    unconfirmed(first.load, "vqa", "next/vqa.safetensors")
    assert (scale(second), second.about()) == (9.0, {"api_server": 1, "version": 2})
    unconfirmed(second.switch, False)
    first.follow()
    assert not first.enabled
    unconfirmed(second.unload, "vqa")
    unconfirmed(first.switch, True)
    for known in (first, second):
        known.follow()
        assert known.enabled
        assert known.tasks() == ["ocr"]
        assert known.about()["version"] == 5
        with pytest.raises(RoutingError, match="no profile 'vqa' to unload; known tasks: ocr"):
            known.unload("vqa")


def test_what_was_admitted_stays_as_it_was_admitted(folder: Path, profiles: Path) -> None:
    first, second = registry(folder, profiles, 0, 1), registry(folder, profiles, 1, 2)
    first.keep_up()
    old = second.resolve(parse_expression("vqa"))
    admission = second.admit(old, "vqa")
    first.load("vqa", "next/vqa.safetensors")
    first.switch(False)
    second.follow()
    assert admission.profile is old
    assert (second.slots_used(), second.in_flight()) == (1, 1)
    assert (first.slots_used(), first.in_flight()) == (0, 0)
    second.leave(admission)
    assert second.slots_used() == 0


def test_each_has_room_of_its_own(folder: Path, profiles: Path) -> None:
    first, second = (registry(folder, profiles, index, 2, max_profiles=1) for index in range(2))
    first.admit(first.resolve(parse_expression("vqa")), "vqa")
    with pytest.raises(CapacityError):
        first.admit(first.resolve(parse_expression("ocr")), "ocr")
    second.admit(second.resolve(parse_expression("ocr")), "ocr")


def test_a_change_that_is_refused_changes_nothing(
    folder: Path, profiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = registry(folder, profiles)
    monkeypatch.setattr(shared_state, "MAX_BYTES", 100)
    with pytest.raises(SharedStateError, match="load fewer, or start one API server"):
        known.load("new", "vqa.safetensors")
    assert (known.tasks(), known.about()["version"]) == (["ocr", "vqa"], 1)
    assert sorted(file.name for file in folder.iterdir()) == ["lock", "state"]


def test_what_cannot_be_read_is_an_error_until_it_can(
    folder: Path, profiles: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known, other = registry(folder, profiles, 0, 2), registry(folder, profiles, 1, 2)
    known._look()
    (folder / "state").rename(folder / "away")
    for _ in range(2):
        with pytest.raises(SharedStateError, match="No such file"):
            known.follow()
        known._look()
    assert [record.message for record in caplog.records] == [
        f"API server 0 answers steered requests with 503: {folder / 'state'}: cannot be read: No such file or directory"
    ]
    with pytest.raises(SharedStateError, match="No such file"):
        other.switch(False)
    with pytest.raises(UnconfirmedError, match=r"server 0 \(process \d+\) cannot take it: .*; API server 1 has not"):
        SharedState(folder, 1, 2, seconds=0).wait(1)
    (folder / "away").rename(folder / "state")
    assert scale(known) == 2.0
    known._look()
    other._look()
    SharedState(folder, 1, 2, seconds=0).wait(1)


def test_a_profile_of_another_model_is_not_taken(folder: Path, profiles: Path) -> None:
    known = registry(folder, profiles)
    another = ModelIdentity("", None, "llama", 2, 8, 32, (5.0,) * 16)
    write_first_state(folder, {"vqa": Profile("vqa", profile("vqa", 1.0).layers, another)})
    for _ in range(2):
        with pytest.raises(SharedStateError, match=r"the shared profile 'vqa' cannot be used: .*another model"):
            known.follow()


def test_a_folder_that_is_gone_is_an_error_and_no_more(
    folder: Path, profiles: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = registry(folder, profiles)
    for file in (*folder.iterdir(), folder):
        file.rmdir() if file.is_dir() else file.unlink()
    known._look()
    known._look()
    assert [record.message.partition(": ")[0] for record in caplog.records] == [
        "API server 0 answers steered requests with 503",
        "API server 0 cannot tell the others what it has",
    ]
    for call in (known.follow, lambda: known.switch(False)):
        with pytest.raises(SharedStateError, match="No such file"):
            call()


# Processes ----------------------------------------------------------------------------------------

PROCESS = """
import os, signal, sys
from pathlib import Path
from hones_serving import shared_state
from hones_serving.shared_registry import SharedRegistry
from hones_serving.shared_state import SharedState
from hones_steer import ModelIdentity
from hones_steer.store import parse_expression

folder, profiles, index, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
identity = ModelIdentity("", None, "llama", 2, 8, 32, (1.0,) * 16)
shared = SharedState(folder, index, count, seconds=60)
known = SharedRegistry(shared, profiles, identity, max_profiles=4, always_enough=False, listing="")
known.keep_up()

def killed(path, data, **_):
    Path(f"{path}.half").write_bytes(data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

for line in sys.stdin:
    command, *arguments = line.split()
    if command == "die-writing":
        shared_state.write_atomically = killed
        known.load(*arguments)
    elif command == "load":
        known.load(*arguments)
    elif command == "scale":
        known.follow()
        print(float(known.resolve(parse_expression(arguments[0])).layers[1][1][0]), flush=True)
        continue
    print("done", flush=True)
"""


class Process:
    """An API server's registry in a process of its own, which does what it is told."""

    def __init__(self, folder: Path, profiles: Path, index: int, count: int) -> None:
        command = [sys.executable, "-c", PROCESS, str(folder), str(profiles), str(index), str(count)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def ask(self, command: str) -> str:
        self.tell(command)
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def processes(folder: Path, profiles: Path) -> Iterator[list[Process]]:
    """Two registries of one state, in two processes."""
    both = [Process(folder, profiles, index, 2) for index in range(2)]
    yield both
    for each in both:
        with suppress(ProcessLookupError):
            os.kill(each.process.pid, signal.SIGCONT)
        each.process.kill()
        each.process.communicate()


def test_a_load_returns_when_every_process_has_it(folder: Path, processes: list[Process]) -> None:
    first, second = processes
    assert first.ask("scale vqa") == second.ask("scale vqa") == "2.0"
    assert first.ask("load vqa next/vqa.safetensors") == "done"
    said = [json.loads((folder / f"server-{index}").read_text()) for index in range(2)]
    assert [(each["pid"], each["version"]) for each in said] == [(each.process.pid, 2) for each in processes]
    assert second.ask("scale vqa") == first.ask("scale vqa") == "9.0"


def test_a_process_that_stands_still_is_named_and_steers_by_nothing_old(
    folder: Path, profiles: Path, processes: list[Process]
) -> None:
    SharedState(folder, 0, 2, seconds=60).wait(1)
    stopped = processes[1].process.pid
    os.kill(stopped, signal.SIGSTOP)
    known = registry(folder, profiles, 0, 2, seconds=0.3)
    with pytest.raises(UnconfirmedError, match=rf"by all in 0\.3 s: API server 1 \(process {stopped}\) has version 1;"):
        known.load("vqa", "next/vqa.safetensors")
    processes[1].tell("scale vqa")  # a request that waits until it goes on
    os.kill(stopped, signal.SIGCONT)
    assert processes[1].ask("scale vqa") == "9.0"
    assert processes[0].ask("scale vqa") == "9.0"


def test_a_process_killed_while_it_writes_changes_nothing_for_others(
    folder: Path, profiles: Path, processes: list[Process]
) -> None:
    """The killed one holds the lock, and has written one half of the next state."""
    first, second = processes
    assert [each.ask("scale vqa") for each in processes] == ["2.0", "2.0"]
    before = (folder / "state").read_bytes()
    assert first.ask("die-writing vqa next/vqa.safetensors") == ""
    assert first.process.wait() == -signal.SIGKILL
    assert (folder / "state").read_bytes() == before
    assert second.ask("scale vqa") == "2.0"
    third = Process(folder, profiles, 0, 2)  # in place of the first
    assert third.ask("load vqa next/vqa.safetensors") == "done"
    assert second.ask("scale vqa") == third.ask("scale vqa") == "9.0"
    third.process.kill()
    third.process.communicate()


def test_many_changes_at_once_are_one_after_the_other(folder: Path, profiles: Path, processes: list[Process]) -> None:
    for number in range(5):
        for index, each in enumerate(processes):
            each.tell(f"load task-{index}-{number} next/vqa.safetensors")
    for each in processes:
        assert each.process.stdout is not None
        assert [each.process.stdout.readline() for _ in range(5)] == ["done\n"] * 5
    known = registry(folder, profiles)
    assert known.about()["version"] == 11
    assert len(known.tasks()) == 12
