"""Every code block of the README and of docs/ runs as it stands, one after the other, where `hones demo` has run.

The README's commands are run by bash. On the other pages, `hones ...` as a line of its own is a call in this process,
which has long imported what a process of its own would need seconds for.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import pytest
from hones_offline.attribution.methods import METHODS
from hones_offline.learning.factors import FitSettings
from hones_offline.learning.methods import STEERING_METHODS
from serving.engines import ENVIRONMENT, free_port

from hones_steer.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PORT = re.compile(r"\b89\d\d\b")
FILE = re.compile(r"`((?:benchmarks|docs|examples|hones_steer|offline|serving|tests)/[\w./-]*\w)`")
ANCHOR = re.compile(r"\b(docs/[\w-]+\.md)(?:#([\w-]+))?")
CODE = ("benchmarks", "examples", "hones_steer", "offline", "serving", "tests")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, code) of every fenced block."""
    yield from BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, after_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(after_demo)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    # The page's own may be taken on this machine.
    ports = {port: str(free_port()) for _, code in blocks(page) for port in PORT.findall(code)}
    for language, written in blocks(page):
        code = PORT.sub(lambda found: ports[found[0]], written)
        if language == "bash" and page.name != "README.md" and (commands := simple_commands(code)):
            for command in commands:
                if command[0] == "hones":
                    assert main(command[1:]) == 0, command
                else:
                    run(command, {})
        elif language == "bash":
            # Transformers decodes images with torchvision where it finds it, and vLLM's here has no compiled code.
            run(["bash", "-euo", "pipefail", "-c", code], {} if "--engine transformers" in code else ENVIRONMENT)
        elif language == "python" and "import LLM" in code:
            Path("offline.py").write_text(code)  # vLLM changes PyTorch, and starts processes that import the script
            run([sys.executable, "offline.py"], ENVIRONMENT)
        elif language == "python":
            exec(compile(code, str(page), "exec"), namespace)


def simple_commands(code: str) -> list[list[str]]:
    """The words of each of a block's lines; none if a shell would see more than words in one of them."""
    lines = code.replace("\\\n", " ").splitlines()
    return [] if re.search(r"[|&;<>$(){}*?~`#]", code) else [shlex.split(line) for line in filter(None, lines)]


def run(command: list[str], environment: Mapping[str, str]) -> None:
    """Run a block with these variables."""
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, env={**os.environ, **environment, "PATH": search}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    """`bash` and `python` run here; `make` shows commands that would build everything again; `text` is output."""
    for language, code in blocks(page):
        assert language in ("bash", "python", "make", "text"), code
        if language == "make":
            for line in filter(None, (line.partition("#")[0].strip() for line in code.splitlines())):
                subprocess.run([*line.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_files_that_pages_name_exist() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").glob("*/README.md"))]:
        for path in FILE.findall(page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_headings_of_pages_that_the_code_names_exist() -> None:
    for path in [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]:
        for page, anchor in ANCHOR.findall(path.read_text(encoding="utf-8")):
            headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, f"{path}: {page}#{anchor}"


def test_the_page_about_methods_has_every_method_and_the_defaults_of_learning() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in (*METHODS, *STEERING_METHODS):
        assert f"`{name}`" in page, name
    learning = page.partition("## Learning")[2].partition("\n#")[0]
    defaults: dict[str, float] = {}
    for names, values in re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", learning, re.MULTILINE):
        defaults |= zip(re.findall(r"`(\w+)`", names), map(float, values.split(" × ")), strict=True)
    settings = {field.name: field.default for field in fields(FitSettings)}
    assert settings.pop("gradient_checkpointing") is False
    assert settings.pop("keep") is None
    assert defaults == settings


def test_links_inside_the_repository_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
