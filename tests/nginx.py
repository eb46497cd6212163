"""A real nginx for tests of what stands in front of servers, from whatever is installed."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


def find_nginx() -> str | None:
    """The program, if there is one: Debian keeps it where not every user's PATH leads."""
    return shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


@contextmanager
def nginx(included: str, port: int, folder: Path) -> Iterator[str]:
    """Run nginx with `included` inside its http block, listening on `port`, until the block ends; yields its URL.

    `folder` is empty and gets its files. An nginx that refuses its configuration fails the test with what it says.
    """
    program = find_nginx()
    assert program, "nginx is not installed; `make test` installs it"
    paths = [f"{name}_temp_path {folder / name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")]
    # Started by root, its workers would be another user's, who cannot keep a large body in this folder.
    user = "user root; " if os.geteuid() == 0 else ""
    settings = folder / "nginx.conf"
    settings.write_text(
        f"{user}daemon off; pid {folder / 'pid'}; error_log {folder / 'error.log'}; events {{}}\n"
        f"http {{ access_log {folder / 'access.log'}; {' '.join(paths)}\n{included}\n}}\n"
    )
    command = [program, "-p", str(folder), "-c", str(settings), "-e", str(folder / "error.log")]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                httpx.get(url, timeout=30)
                break
            except httpx.ConnectError:
                assert process.poll() is None, (folder / "error.log").read_text()
                assert time.monotonic() < deadline, (folder / "error.log").read_text()
                time.sleep(0.05)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
