"""Import paths that README, docs and examples name work, and so do those that earlier versions of them named."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hones_offline
import pytest
from hones_offline.moved import MOVED

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
SCRIPTS = sorted((ROOT / "examples").rglob("*.py"))
IMPORT = re.compile(r"^\s*((?:from|import) hones_\w+.*)$", re.MULTILINE)
DOTTED = re.compile(r"\bhones_(?:steer|offline|serving)(?:\.[A-Za-z_]\w*)+")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

DOCUMENTED_BEFORE = """
from hones_offline import attribute, evaluate, fit
from hones_offline import Attribution, Example, Scores, Task, get_task
from hones_offline import scenes as scene_data
from hones_offline.comparison import compare
from hones_offline.datasets import load_dataset
from hones_offline.demo import COMPARED, NEGATIVES
from hones_offline.distributed import Processes, launched
from hones_offline.embedded import load_tiny_vlm
from hones_offline.evaluate import evaluate, score
from hones_offline.examples import MemoryImage, check_disjoint, load_jsonl, scene_examples
from hones_offline.finding import METHODS, STAGES, CompareSettings
from hones_offline.fit import FitSettings, fit
from hones_offline.metrics import METRICS, Aggregate, FloatArray, bootstrap_interval, mean_of_rows, ndcg_at_k
from hones_offline.models import keep_freed_memory, load_model
from hones_offline.prompts import Prepared, prepare
from hones_offline.report import report
from hones_offline.scenes import CHARACTERS, COLORS, SHAPES, SPLITS, TASKS, Scene, scenes
from hones_offline.study import STEERED, Splits
from hones_offline.tasks import TASKS, JsonlTask, Task, get_task
from hones_serving.routing import decide, facts_of_chat
from hones_serving.routing_file import load_plan
from hones_steer import LayoutError, ModelIdentity, Profile, ProfileStore, RoutingError, Steering
from hones_steer import DataError, HonesError, MismatchError, ProfileError, StateError
from hones_steer import export_lora, export_peft, find_layout, import_peft, load_profile, merge_into
from hones_steer import pull_profile, push_profile, register_layout, save_profile, steer
from hones_steer.layout import DecoderLayer, Layout
import hones_offline.models; hones_offline.models.keep_freed_memory
""".strip().splitlines()
"""Imports of pages and example scripts while all modules of `hones_offline` lay in one folder."""


def imports_of(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every import from our packages in Python source; no name for `import module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hones_"):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("hones_"))


def documented(page: Path) -> set[tuple[str, str]]:
    """The imports in a page's Python blocks, and in other blocks wherever a line is an import."""
    text = page.read_text(encoding="utf-8")
    sources = [*PYTHON.findall(text), *IMPORT.findall(PYTHON.sub("", text))]
    return {pair for source in sources for pair in imports_of(source)}


def resolve(module: str, name: str) -> object:
    """The object that `from module import name` gives; raises what the import raises."""
    source = importlib.import_module(module)
    if not name:
        return source
    return getattr(source, name) if hasattr(source, name) else importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_imports_of_a_page_work(page: Path) -> None:
    for module, name in sorted(documented(page)):
        resolve(module, name)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_the_imports_of_an_example_work(script: Path) -> None:
    for module, name in sorted(set(imports_of(script.read_text(encoding="utf-8")))):
        resolve(module, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_dotted_names_in_a_page_exist(page: Path) -> None:
    for dotted in sorted(set(DOTTED.findall(page.read_text(encoding="utf-8")))):
        module, _, name = dotted.rpartition(".")
        resolve(module, name)


def test_pages_and_scripts_import_from_the_places_where_things_are() -> None:
    places = {f"hones_offline.{old}" for old in MOVED}
    for path in PAGES:
        assert not places & {module for module, _ in documented(path)}, path
    for path in SCRIPTS:
        assert not places & {module for module, _ in imports_of(path.read_text(encoding="utf-8"))}, path


def test_imports_are_found_in_pages() -> None:
    found = {pair for page in PAGES for pair in documented(page)}
    assert ("hones_steer", "steer") in found
    assert ("hones_offline.data.scenes", "scenes") in found
    assert documented(ROOT / "docs" / "profile-format.md") >= {("hones_steer", "load_profile")}  # in a block of bash


@pytest.mark.parametrize("line", DOCUMENTED_BEFORE)
def test_an_import_that_was_documented_before_works(line: str) -> None:
    exec(line, {})


@pytest.mark.parametrize("old", MOVED)
def test_a_module_under_its_old_name_gives_the_objects_of_the_new_one(old: str) -> None:
    before, places = importlib.import_module(f"hones_offline.{old}"), MOVED[old]
    for place in reversed((places,) if isinstance(places, str) else places):  # a name in two of them is the first's
        now = importlib.import_module(f"hones_offline.{place}")
        names = [name for name in vars(now) if not name.startswith("__")]
        assert names
        for name in names:
            assert getattr(before, name) is not None
        defined = [name for name in names if getattr(vars(now)[name], "__module__", None) == now.__name__]
        for name in defined:
            assert getattr(before, name) is getattr(now, name), name
    assert not hasattr(before, "nothing_of_that_name")


def test_fit_and_evaluate_stay_functions_whatever_is_imported_first() -> None:
    script = """
from hones_offline.fit import FitSettings
from hones_offline.evaluate import score
from hones_offline.scenes import scenes
import hones_offline.fit, hones_offline.evaluate
from hones_offline import evaluate, fit
from hones_offline.learning import factors
from hones_offline.running import evaluation

assert FitSettings is factors.FitSettings and score is evaluation.score
assert fit is hones_offline.fit is factors.fit
assert evaluate is hones_offline.evaluate is evaluation.evaluate
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert callable(hones_offline.fit)
    assert callable(hones_offline.evaluate)


WALKS = {
    "From an example to a neuron's importance": "offline/hones_offline",
    "From a profile file to a multiplied activation in vLLM": "serving/hones_serving",
}


def defined_in(path: Path) -> set[str]:
    """The dotted names of the functions, classes, methods and module variables in a file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if hasattr(inner, "name")}
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize(("heading", "package"), WALKS.items(), ids=WALKS.values())
def test_a_walk_in_contributing_names_functions_that_exist(heading: str, package: str) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    walk = text.partition(f"### {heading}")[2].partition("\n##")[0]
    steps = re.findall(r"^\d+\. .*$", walk, re.MULTILINE)
    assert 5 <= len(steps) <= 12
    for dotted in re.findall(r"`((?:\w+\.)+\w+)`", "\n".join(steps)):
        parts = dotted.split(".")
        base = ROOT if parts[0] == "hones_steer" else ROOT / package
        files = [(base.joinpath(*parts[:i]).with_suffix(".py"), ".".join(parts[i:])) for i in range(1, len(parts))]
        found = [(file, name) for file, name in files if file.is_file()]
        if parts[-1] in ("json", "py") or parts[0][0].isupper():  # a file, a class of vLLM's
            continue
        assert found, dotted
        assert found[0][1] in defined_in(found[0][0]), dotted
    named = [step for step in steps if re.search(r"`(?:\w+\.)+\w+`", step)]
    assert len(named) == len(steps)
