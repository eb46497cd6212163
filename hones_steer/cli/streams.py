"""The standard streams of a command: closed ones, full disks, readers that leave, warnings in one line."""

from __future__ import annotations

import io
import os
import select
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


def open_closed_streams() -> None:
    """Let what a caller has closed (``>&-``) lead nowhere.

    Python has None there, and the next file that is opened would get the number, and what is printed with it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, descriptor == number)
            stream = open(descriptor, "w" if number else "r", errors="backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def flush_output() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        error.filename = "the output"
        raise


def say(text: str) -> None:
    """Write to standard error, where somebody may listen."""
    try:
        sys.stderr.write(text + "\n")
    except OSError:
        discard(sys.stderr)


def reader_left(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except io.UnsupportedOperation:
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def discard(stream: TextIO) -> None:
    """Let what is still in a stream's buffer, and what is written later, lead nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def one_line_warnings(prog: str) -> Iterator[None]:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del category, filename, lineno, file, line
        say(f"{prog}: warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
