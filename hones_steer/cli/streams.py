"""Standard streams that are closed, full or left by their reader, and warnings in one line."""

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
    """Open the streams that the caller has closed (``>&-``) on /dev/null.

    Otherwise the next file that is opened would get a closed stream's number, and everything printed to it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, descriptor == number)
            stream = open(descriptor, "w" if number else "r", errors="backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def flush_output() -> None:
    """Flush standard output; raises OSError that names it if the output cannot be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        error.filename = "the output"
        raise


def say(text: str) -> None:
    """Write a line to standard error; nothing happens if it cannot be written."""
    try:
        sys.stderr.write(text + "\n")
    except OSError:
        discard(sys.stderr)


def reader_left(stream: TextIO) -> bool:
    """Whether the program at the other end of the stream has closed it."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except io.UnsupportedOperation:
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def discard(stream: TextIO) -> None:
    """Send what is still in the stream's buffer, and whatever is written later, to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


@contextmanager
def one_line_warnings(prog: str) -> Iterator[None]:
    """Show each warning, within the block, as one line that begins with the command's name."""

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
