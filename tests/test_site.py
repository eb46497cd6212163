"""The documentation as a site: it builds without a warning, says everything, and fetches nothing from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import browser
import hones_offline
import pytest

import hones_steer

ROOT = Path(__file__).parents[1]


def build(root: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_a_page_that_nothing_leads_to_and_a_broken_link_fail_the_build(tmp_path: Path) -> None:
    for name in ("docs", "mkdocs.yml"):
        (shutil.copytree if name == "docs" else shutil.copy)(ROOT / name, tmp_path / name)
    for name in ("hones_steer", "offline", "serving"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs" / "lost.md").write_text("# Lost\n\n[nowhere](nowhere.md), [no such part](concepts.md#nothing)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for culprit in ("lost.md", "nowhere.md", "#nothing"):
        assert culprit in done.stderr


def test_every_page_is_in_the_navigation(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in start, page.name


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    documented = set(re.findall(r'id="([\w.]+)"', (site / "api.html").read_text(encoding="utf-8")))
    wanted = {f"hones_steer.{name}" for name in hones_steer.__all__ if name != "__version__"}
    wanted |= {f"hones_offline.{name}" for name in hones_offline.__all__}
    assert wanted <= documented


def test_the_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    fetched = []
    with browser.chromium() as running:
        tab = running.new_page()
        tab.on("request", lambda request: fetched.append(request.url))
        for name in ("index", "concepts", "api"):
            tab.goto((site / f"{name}.html").as_uri(), wait_until="networkidle")
    assert any(url.endswith("dataflow.svg") for url in fetched)
    assert [url for url in fetched if not url.startswith(("file:", "data:", "blob:"))] == []
