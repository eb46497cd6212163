"""Run every test, the matrices as well, part by part: `python tests/all_parts.py [PART ...]`; --list names the parts.

`make test-all` calls it. A part that has passed with the very files and packages that are here is not run again, so it
can be stopped and goes on where it was; `.test-all/` remembers. Exits with 1 if a part failed, with 2 if there is no
such part.
"""

import datetime
import hashlib
import os
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PASSED = ROOT / ".test-all"
SERVING = sorted((ROOT / "tests" / "serving").glob("test_*.py"))
ENGINE = ("test_in_vllm", "test_vllm_benchmark")
HTTP = ("test_http", "test_playground", "test_replicas", "test_servers")
PARTS: dict[str, list[Path]] = {
    "whole": sorted((ROOT / "tests").glob("test_*.py")),  # documentation, packages, architecture
    "steer": [ROOT / "tests" / "steer"],
    "offline": [ROOT / "tests" / "offline"],
    "serving": [file for file in SERVING if file.stem not in ENGINE + HTTP],
    "http": [file for file in SERVING if file.stem in HTTP],
    "engine": [file for file in SERVING if file.stem in ENGINE],
}


def what_is_here() -> str:
    """A hash of all files that git does not ignore, of Python and of the packages installed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    known = hashlib.sha256(sys.version.encode())
    known.update("\n".join(sorted(f"{each.name}=={each.version}" for each in distributions())).encode())
    for name in sorted(set(filter(None, listed.stdout.decode().split("\0")))):
        file = ROOT / name
        if file.is_file():
            known.update(f"\0{name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return known.hexdigest()


def passed_before(part: str, here: str) -> str | None:
    """The record in `.test-all/` of a part, if it is about the files that are here."""
    file = PASSED / part
    if not file.exists():
        return None
    of, _, said = file.read_text(encoding="utf-8").partition("\n")
    return said.strip() if of == here else None


def run(part: str, here: str) -> str | None:
    """Run a part; what to say of it if it passed."""
    workers = os.environ.get("WORKERS", "2")
    command = [sys.executable, "-m", "pytest", "--numprocesses", workers]
    start = time.monotonic()
    if subprocess.run([*command, *map(str, PARTS[part])], cwd=ROOT).returncode != 0:
        return None
    minutes = (time.monotonic() - start) / 60
    said = f"passed on {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC in {minutes:.1f} minutes"
    if here == what_is_here():  # or it is not known what has passed
        PASSED.mkdir(exist_ok=True)
        (PASSED / part).write_text(f"{here}\n{said}\n", encoding="utf-8")
    return said


def main(asked: list[str]) -> int:
    """See the module."""
    if asked == ["--list"]:
        print("\n".join(PARTS))
        return 0
    if unknown := [part for part in asked if part not in PARTS]:
        print(f"no such part: {', '.join(unknown)}; there are: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    here = what_is_here()
    report: dict[str, str | None] = {}
    for part in asked or PARTS:
        report[part] = passed_before(part, here) or run(part, here)
    print()
    for part, said in report.items():
        print(f"{part:8} {said or 'FAILED'}")
    return 0 if all(report.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
