"""State that several API servers of one vLLM server agree on, in a folder of that server.

state       the profiles by name, their contents, and the kill switch; replaced as a whole, never written into
lock        locked by the process that is changing the state; the kernel unlocks it when that process ends
server-<i>  what API server i has read: its process, the state's version, and why it cannot read it any more
routing.yaml  a copy of the routing file, so that all have read the same one

The process that starts the API servers makes the folder, which only its user may enter, and each of them looks for a
new state before it decides on a request. So once a state is in place nobody decides by an older one; what `wait` waits
for is that all can read it. Nothing is written into the folder of profiles, which may be read-only.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hones_steer.errors import StateError
from hones_steer.files import write_atomically
from hones_steer.strict_json import parse_object

ROUTING = "routing.yaml"
MAX_BYTES = 256 * 2**20  # of a state
MAX_SEEN_BYTES = 2**16  # of what a server says that it has read
WAIT_SECONDS = 10.0

_STATE, _LOCK, _SEEN = "state", "lock", "server-{}"
_FORMAT = 1
_POLL_SECONDS = 0.02


class SharedStateError(StateError):
    """The state that API servers share cannot be read or changed: HTTP 503 for whatever depends on it."""


class UnconfirmedError(SharedStateError):
    """The state is changed, but not every API server has said that it has it."""


class Stored(NamedTuple):
    """A profile of the state: the file that it was read from, relative to the folder of profiles, and its bytes."""

    file: str
    data: bytes


@dataclass(frozen=True)
class State:
    """One version of the state; a change makes the next one."""

    version: int
    enabled: bool
    profiles: Mapping[str, Stored]

    def to_bytes(self) -> bytes:
        """A line of JSON, and the bytes of all profiles."""
        listed = [{"name": name, "file": each.file, "bytes": len(each.data)} for name, each in self.profiles.items()]
        head = {"format": _FORMAT, "version": self.version, "enabled": self.enabled, "profiles": listed}
        return b"".join([json.dumps(head).encode(), b"\n", *(each.data for each in self.profiles.values())])

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """The state that `to_bytes` wrote. Raises SharedStateError if these are other bytes."""
        line, newline, rest = data.partition(b"\n")
        head = parse_object(line, "the state's first line", SharedStateError)
        if not newline or head.get("format") != _FORMAT:
            raise SharedStateError(f"the state is not of format {_FORMAT}")
        try:
            profiles = {}
            for each in head["profiles"]:
                profiles[each["name"]] = Stored(each["file"], rest[: each["bytes"]])
                rest = rest[each["bytes"] :]
            state = cls(head["version"], head["enabled"], profiles)
        except (KeyError, TypeError) as error:
            raise SharedStateError(f"the state's first line lacks {error}") from error
        sound = type(state.version) is int and type(state.enabled) is bool
        if not sound or rest or state.to_bytes() != data:
            raise SharedStateError("the state's first line does not fit what follows it")
        return state


class SharedState:
    """The state in a folder, as API server `index` of `count` has it. Not for several threads at once, but `changing`.

    `seconds` is how long it waits for the others: to end a change, and to confirm one.

    Raises:
        SharedStateError: `folder` is no folder of this user's that nobody else can enter.
    """

    def __init__(self, folder: Path, index: int, count: int, *, seconds: float = WAIT_SECONDS) -> None:
        _require_private(folder)
        self.index = index
        self._folder = folder
        self._count = count
        self._seconds = seconds
        self._held: int | None = None  # the state that was read last, kept open so that no other file has its number

    def read(self) -> State | None:
        """The state, if it is another than was read last; else None.

        Raises:
            SharedStateError: it is missing, no regular file of this user's, too large, or broken.
        """
        try:
            there = (self._folder / _STATE).lstat()
        except OSError as error:
            raise SharedStateError(f"{self._folder / _STATE}: cannot be read: {error.strerror}") from error
        if self._held is not None and os.path.samestat(there, os.fstat(self._held)):
            return None
        _require_private(self._folder)
        descriptor, data = _read(self._folder / _STATE, MAX_BYTES)
        try:
            state = State.from_bytes(data)
        except SharedStateError as error:
            os.close(descriptor)
            raise SharedStateError(f"{self._folder / _STATE}: {error}") from error
        self.forget()
        self._held = descriptor
        return state

    def forget(self) -> None:
        """Have `read` give the state again, whether it has changed or not."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Keep all others from changing the state within the block.

        Raises:
            SharedStateError: another has kept it for too long, or the folder is gone.
        """
        deadline = time.monotonic() + self._seconds
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._folder / _LOCK, flags, 0o600)
        except OSError as error:
            raise SharedStateError(f"{self._folder / _LOCK}: cannot be locked: {error.strerror}") from error
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise SharedStateError(
                            f"another change has not ended within {self._seconds:g} s; try again, or restart the server"
                        ) from error
                    time.sleep(_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def write(self, state: State) -> None:
        """Replace the state; within `changing`. Raises SharedStateError if it is too large or cannot be written."""
        write_state(self._folder, state)

    def confirm(self, version: int, problem: str | None = None) -> None:
        """Say which version this server has, and why it cannot read another. Raises SharedStateError if it cannot."""
        said = {"pid": os.getpid(), "version": version, "problem": problem}
        data = json.dumps(said).encode()
        write_atomically(self._seen(self.index), data, parents=False, error_type=SharedStateError)

    def wait(self, version: int) -> None:
        """Wait until every server has confirmed this version or a later one.

        Raises:
            UnconfirmedError: one has not in time, or says that it cannot; the message names it.
        """
        deadline = time.monotonic() + self._seconds
        while missing := dict(self._missing(version)):
            if time.monotonic() > deadline:
                who = "; ".join(f"API server {index} {reason}" for index, reason in missing.items())
                raise UnconfirmedError(
                    f"the change is made (version {version}), but not confirmed by all in {self._seconds:g} s: {who}; "
                    "none of them steers by what was before; if that stays so, restart the server"
                )
            time.sleep(_POLL_SECONDS)

    def _missing(self, version: int) -> Iterator[tuple[int, str]]:
        """Yield each server that has not confirmed a version, with the reason."""
        for index in range(self._count):
            if not self._seen(index).exists():
                yield index, "has not started"
                continue
            said = self._said(index)
            if said["problem"] is not None:
                yield index, f"(process {said['pid']}) cannot take it: {said['problem']}"
            elif said["version"] < version:
                yield index, f"(process {said['pid']}) has version {said['version']}"

    def _said(self, index: int) -> dict[str, Any]:
        descriptor, data = _read(self._seen(index), MAX_SEEN_BYTES)
        os.close(descriptor)
        return parse_object(data, str(self._seen(index)), SharedStateError)

    def _seen(self, index: int) -> Path:
        return self._folder / _SEEN.format(index)


def write_state(folder: Path, state: State) -> None:
    """Replace the state in a folder, or write the first. Raises SharedStateError if it is too large or that fails."""
    data = state.to_bytes()
    if len(data) > MAX_BYTES:
        raise SharedStateError(
            f"all profiles together take {len(data) / 2**20:.0f} MiB, more than the {MAX_BYTES // 2**20} that several "
            "API servers share; load fewer, or start one API server (--api-server-count 1)"
        )
    write_atomically(folder / _STATE, data, parents=False, error_type=SharedStateError)


def _require_private(folder: Path) -> None:
    try:
        status = folder.lstat()
    except OSError as error:
        raise SharedStateError(f"{folder}: cannot be read: {error.strerror}; restart the server") from error
    if not stat.S_ISDIR(status.st_mode):
        raise SharedStateError(f"{folder}: is no folder; restart the server, which makes one of its own")
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise SharedStateError(
            f"{folder}: belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}, but only this "
            f"server's user {os.geteuid()} may enter it (mode 700); restart the server, which makes one of its own"
        )


def _read(path: Path, most: int) -> tuple[int, bytes]:
    """Open a regular file of this user's that has at most so many bytes: its descriptor, which stays open, and they."""
    try:
        # Non-blocking, or opening a FIFO would wait for a writer forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SharedStateError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise SharedStateError(f"{path}: is no regular file of user {os.geteuid()}")
        if status.st_size > most:
            raise SharedStateError(f"{path}: is larger than {most:,} bytes")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(most)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, data
