"""`make test-all`: its parts hold every test, and one that has passed is run again only when something has changed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import all_parts

TEST = """
from pathlib import Path

def test_that_counts():
    with Path({count!r}).open("a") as file:
        file.write("run\\n")
    assert {passes}
"""


def test_every_file_of_tests_is_in_one_part() -> None:
    parts = [file for paths in all_parts.PARTS.values() for path in paths for file in files(path)]
    in_vllm = set(files(Path(__file__).parent / "serving" / "engine"))  # which test_in_vllm.py runs
    assert sorted(parts) == sorted(set(files(Path(__file__).parent)) - in_vllm)


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.rglob("test_*.py"))


def test_what_has_passed_is_run_again_only_if_something_changed(tmp_path: Path) -> None:
    repository, count = tmp_path / "repository", tmp_path / "count"
    (repository / "tests" / "steer").mkdir(parents=True)
    shutil.copy(all_parts.__file__, repository / "tests")
    (repository / ".gitignore").write_text(".*\n__pycache__\n")
    subprocess.run(["git", "init", "--quiet"], cwd=repository, check=True)

    def run(passes: bool) -> tuple[int, int, str]:
        """The exit code of running one part, how often its test has run so far, and the report."""
        test = TEST.format(count=str(count), passes=passes)
        (repository / "tests" / "steer" / "test_counting.py").write_text(test)
        command = [sys.executable, "tests/all_parts.py", "steer"]
        environment = {**os.environ, "WORKERS": "0"}
        done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
        return done.returncode, len(count.read_text().splitlines()), done.stdout.splitlines()[-1]

    code, runs, said = run(passes=True)
    assert (code, runs) == (0, 1)
    assert said.startswith("steer    passed on ")
    assert run(passes=True) == (0, 1, said)
    assert run(passes=False) == (1, 2, "steer    FAILED")
    assert run(passes=False) == (1, 3, "steer    FAILED")


def test_a_part_that_is_none() -> None:
    done = subprocess.run([sys.executable, all_parts.__file__, "stear"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "no such part: stear; there are: whole, steer, offline, serving, http, engine\n"


def test_what_shares_something_expensive_runs_in_one_worker(tmp_path: Path) -> None:
    """Otherwise each worker would start the engine, the server or the demo that the file's tests share."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    for file in ("test_one", "test_two", "test_three"):
        test = "import os\n\nimport pytest\n\n\n@pytest.mark.parametrize('case', range(8))\n"
        test += f"def test_it(case):\n    print('ran', {file!r}, os.environ['PYTEST_XDIST_WORKER'])\n"
        (tmp_path / f"{file}.py").write_text(test, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-rP", "--numprocesses", "2", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = re.findall(r"^ran (\w+) (gw\d)$", done.stdout, re.MULTILINE)
    assert len(ran) == 24
    assert len(set(ran)) == 3
