"""The address that a server listens on, bound before the long start so that a wrong one is refused at once."""

from __future__ import annotations

import errno
import socket
from typing import Any

from hones_steer.errors import DataError

HOST, PORT = "0.0.0.0", 8000

_BACKLOG = 2048

# Errors for an address that a machine may lack, such as ::1 for localhost where there is no IPv6.
_ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind a socket to every address of `host` that this machine has. None listens yet, so clients are refused.

    Raises:
        DataError: no address of the host is this machine's, or the port is in use or not allowed.
    """
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise DataError(f"--host {host!r} is no address: {error}; name one of this machine's, or 0.0.0.0") from error
    bound: list[socket.socket] = []
    absent: OSError | None = None
    for family, kind, protocol, _, address in addresses:
        try:
            bound.append(_bound(family, kind, protocol, address))
        except OSError as error:
            if error.errno in _ABSENT:
                absent = error
                continue
            close(bound)
            raise _refused(host, port, error) from error
    if not bound:
        raise DataError(
            f"--host {host!r} is not this machine: {absent and absent.strerror}; name an address of it, or 0.0.0.0"
        )
    return bound


def listen(sockets: list[socket.socket]) -> None:
    """Listen on bound sockets. Raises DataError where another process, bound at the same time, has begun to."""
    for bound in sockets:
        try:
            bound.listen(_BACKLOG)
        except OSError as error:
            host, port = bound.getsockname()[:2]
            raise _refused(host, port, error) from error


def close(sockets: list[socket.socket]) -> None:
    """Close all sockets."""
    for bound in sockets:
        bound.close()


def _refused(host: str, port: int, error: OSError) -> DataError:
    where = f"port {port} of {host}" if host else f"port {port}"
    return DataError(f"cannot listen on {where}: {error.strerror}; name another one with --port, or end what has it")


def _bound(family: int, kind: int, protocol: int, address: tuple[Any, ...]) -> socket.socket:
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended does not count
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # the IPv4 address has its own socket
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound
