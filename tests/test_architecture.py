"""Imports: who may import whom, and what `import hones_steer` and `hones --help` load.

An arrow runs from who is imported to who imports. Inside hones_steer: errors → {files, strict_json} → profile → store;
errors → {experts, ffns} → layout; errors → scopes; ffns → identity → profile → slots; {layout, scopes, slots} →
injection → huggingface; all these → the rooms export and cli.
Between the packages: hones_offline ← hones_steer → hones_serving. Imports inside functions count like all others.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import pytest

import hones_steer

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "hones_steer": ROOT / "hones_steer",
    "hones_offline": ROOT / "offline" / "hones_offline",
    "hones_serving": ROOT / "serving" / "hones_serving",
}

# Module of hones_steer -> the modules and rooms (packages) it may import. A new module needs a line here.
_BELOW_HUGGINGFACE = {
    "errors",
    "profile",
    "store",
    "layout",
    "scopes",
    "slots",
    "_blocks",
    "_calls",
    "_packing",
    "injection",
    "_folding",
    "_selftest",
}
_ADAPTER = {"errors", "ffns", "layout", "profile", "slots", "_folding", "export.adapters", "export.sidecar"}
ALLOWED = {
    "_version": set(),
    "errors": set(),
    "_transformers": set(),
    "files": {"errors"},
    "strict_json": {"errors"},
    "json_values": {"errors"},
    "ffns": {"errors", "json_values"},
    "identity": {"errors", "ffns", "json_values"},
    "ffn_scales": {"errors", "ffns", "identity"},
    "profile_file": {"errors", "ffn_scales", "ffns", "identity", "json_values", "strict_json"},
    "profile": {
        "_version",
        "errors",
        "ffn_scales",
        "files",
        "identity",
        "json_values",
        "profile_file",
        "strict_json",
    },
    "store": {"errors", "profile"},
    "experts": {"errors"},
    "layout": {"errors", "experts", "ffns"},
    "slots": {"errors", "ffns", "profile"},
    "scopes": {"errors"},
    "_calls": {"errors"},
    "_blocks": {"_calls", "errors", "scopes", "slots"},
    "_packing": {"_blocks", "errors", "scopes", "slots"},
    "_recomputation": {"_blocks", "errors", "slots"},
    "injection": {"_blocks", "_calls", "_recomputation", "errors", "experts", "ffns", "layout", "slots"},
    "_folding": {"errors", "ffn_scales", "ffns", "injection", "layout", "profile"},
    "_selftest": {"errors", "experts", "ffns", "injection", "layout", "profile", "slots"},
    "huggingface": _BELOW_HUGGINGFACE,
    "loading": {"errors"},
    "export": set(),
    "export.cards": {"profile"},
    "export.sidecar": {"errors", "ffns", "layout", "profile", "strict_json"},
    "export.checkpoint": {"errors", "layout", "loading", "strict_json"},
    "export.adapters": {"errors", "ffns", "layout", "files", "profile", "export.cards", "export.sidecar"},
    "export.peft": _ADAPTER,
    "export.lora": _ADAPTER,
    "export.merged": {
        "errors",
        "ffn_scales",
        "ffns",
        "injection",
        "layout",
        "files",
        "profile",
        "_folding",
        "export.cards",
        "export.checkpoint",
        "export.sidecar",
    },
    "importing": {"errors", "ffns", "layout", "profile", "strict_json", "export"},
    "hub": {"errors", "profile", "store", "files", "strict_json", "export.cards"},
    "cli": {"cli.program"},
    "cli.streams": set(),
    "cli.program": {"_version", "errors", "cli.streams"},
    "cli.output": {"profile"},
    "cli.inspect_command": {"ffns", "profile", "cli.output"},
    "cli.diff_command": {"ffns", "profile", "cli.output"},
    "cli.verify_command": {"errors", "profile", "huggingface", "loading", "cli.output"},
    "cli.export_command": {"profile", "loading", "export", "importing", "cli.output"},
    "cli.hub_commands": {"errors", "profile", "store", "hub", "cli.output"},
    "__main__": {"cli"},
    "__init__": {"_version", *_BELOW_HUGGINGFACE, "huggingface", "export", "importing", "hub"},
}
# The exceptions, each at one place: (module, function) -> imported module.
EXCEPTIONS = {("identity", "ModelIdentity.from_model", "layout")}

# These run with the base dependencies; the commands import the rest inside their functions.
BASE_MODULES = {"__init__", "__main__", "_version", "errors", "files", "scopes", "store", "strict_json"}
BASE_MODULES |= {"ffn_scales", "ffns", "identity", "json_values", "profile", "profile_file"}
EXTRAS = {"hones_steer": "hf", "hones_offline": "offline", "hones_serving": "serve"}
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "google_re2": "re2"}


class Import(NamedTuple):
    """An imported module or name, and its place: `function` is dotted, empty at module level."""

    package: str
    module: str
    function: str
    target: str
    line: int
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.package}/{self.module}.py:{self.line} imports {self.target}"


def module_name(path: Path, folder: Path) -> str:
    """The dotted name of a module below its package; a room's own `__init__.py` has the room's name."""
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports_of(package: str, path: Path) -> Iterator[Import]:
    module = module_name(path, PACKAGES[package])
    parent = [package, *path.relative_to(PACKAGES[package]).parent.parts]

    def walk(node: ast.AST, function: str, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}" if function else node.name
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            typing_only = True
        for target in targets(node, parent):
            yield Import(package, module, function, target, getattr(node, "lineno", 0), typing_only)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function, typing_only)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), "", False)


def targets(node: ast.AST, parent: list[str]) -> list[str]:
    """The dotted names that an import statement asks for, relative ones resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = parent[: len(parent) - node.level + 1] if node.level else []
        source = ".".join([*base, node.module] if node.module else base)
        return [f"{source}.{alias.name}" for alias in node.names]
    return []


def all_imports() -> list[Import]:
    return [
        found
        for package, folder in PACKAGES.items()
        for path in sorted(folder.rglob("*.py"))
        for found in imports_of(package, path)
    ]


IMPORTS = all_imports()


def steer_module(target: str) -> str | None:
    """The module of hones_steer that `target` lies in: `hones_steer.export.peft.export_peft` -> `export.peft`."""
    package, _, name = target.partition(".")
    if package != "hones_steer":
        return None
    while name and name not in ALLOWED:
        name = name.rpartition(".")[0]
    return name or "__init__"


def room(module: str) -> str:
    """The room of a module; a module outside all rooms is one by itself."""
    return module.partition(".")[0]


def test_every_module_of_hones_steer_has_its_place() -> None:
    assert {module_name(path, PACKAGES["hones_steer"]) for path in PACKAGES["hones_steer"].rglob("*.py")} == set(
        ALLOWED
    )


def test_hones_steer_imports_downwards_only() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if found.package == "hones_steer"
        and (target := steer_module(found.target)) is not None
        and not {target, room(target)} & ALLOWED[found.module]
        and (found.module, found.function, target) not in EXCEPTIONS
    ]
    assert wrong == []


def test_no_arrow_between_modules_or_rooms_of_hones_steer_runs_back() -> None:
    tuple(TopologicalSorter(ALLOWED).static_order())  # raises CycleError
    rooms: dict[str, set[str]] = {}
    for module, below in ALLOWED.items():
        rooms.setdefault(room(module), set()).update({room(target) for target in below} - {room(module)})
    tuple(TopologicalSorter(rooms).static_order())


def test_nobody_imports_upwards_between_packages() -> None:
    may = {
        "hones_steer": {"hones_steer"},
        "hones_offline": {"hones_offline", "hones_steer"},
        "hones_serving": {"hones_serving", "hones_steer"},
    }
    wrong = [
        str(found)
        for found in IMPORTS
        if (top := found.target.partition(".")[0]) in PACKAGES and top not in may[found.package]
    ]
    assert wrong == []


# The rooms of hones_offline, in the order of the path through them: each may import those before it.
ROOMS = ("data", "running", "attribution", "learning", "comparison", "search", "report", "commands", "demo", "moved")
ROOMS += ("__init__",)


def room_of(target: str) -> int | None:
    """The number of the room that `target` lies in: `hones_offline.data.tasks.Task` -> 0; None outside the package."""
    parts = target.split(".")
    if parts[0] != "hones_offline":
        return None
    return ROOMS.index(parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__")


def test_no_arrow_runs_back_in_hones_offline() -> None:
    folder = PACKAGES["hones_offline"]
    assert {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__pycache__"} <= {
        *ROOMS
    }
    wrong = [
        str(found)
        for found in IMPORTS
        if found.package == "hones_offline"
        and (target := room_of(found.target)) is not None
        and target > ROOMS.index(found.module.partition(".")[0])
    ]
    assert wrong == []


def test_no_module_of_hones_offline_has_the_name_of_a_public_function() -> None:
    import hones_offline

    folder = PACKAGES["hones_offline"]
    modules = {path.stem for path in folder.iterdir()}
    assert modules & {*hones_offline.__all__} == set()


def test_offline_takes_only_the_scaling_and_the_hooks_from_injection() -> None:
    taken = {
        found.target
        for found in IMPORTS
        if found.package == "hones_offline" and found.target.startswith("hones_steer.injection")
    }
    assert taken <= {f"hones_steer.injection.{name}" for name in ("scale", "input_hooks", "InstanceMethods")}


def test_hooks_are_set_only_where_contributing_says() -> None:
    setting = {
        f"{package}.{module_name(path, folder)}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
        if re.search(r"\bregister_forward_(?:pre_)?hook\(|\binput_hooks\(", path.read_text(encoding="utf-8"))
    }
    of_offline = {f"hones_offline.running.{name}" for name in ("hooks", "readings", "resumption")}
    assert setting == {*of_offline, "hones_steer.injection", "hones_steer._selftest", "hones_serving.vllm.scaling"}


def test_modules_are_imported_by_name_only_where_that_is_the_point() -> None:
    callers = set()
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            names = re.findall(r"\b(?:import_module|__import__|entry_points)\b", path.read_text(encoding="utf-8"))
            callers |= {f"{package}.{module_name(path, folder)}"} if names else set()
    steer = {"hones_steer.__init__", "hones_steer.cli.program"}
    assert callers == {*steer, "hones_offline.moved", "hones_serving.commands"}


def requirements(extra: str | None) -> set[str]:
    """The import names of an extra's distributions (None: the base), other extras of ours included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = project["dependencies"] if extra is None else project["optional-dependencies"].get(extra, [])
    names: set[str] = set()
    for requirement in listed:
        own = re.match(r"hones-steer\[(.+)\]", requirement)
        if own:
            names |= set().union(*(requirements(other) for other in own[1].split(",")))
            continue
        name = re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("-", "_")
        names.add(IMPORT_NAMES.get(name, name))
    return names


def allowed_third_parties(found: Import) -> set[str]:
    if found.package == "hones_serving" and room(found.module) == "vllm":
        return requirements(None) | requirements("hf") | requirements("vllm")
    if found.package != "hones_steer":
        return requirements(None) | requirements("hf") | requirements(EXTRAS[found.package])
    if found.module == "export.adapters" and found.function == "peft_package":
        return requirements("peft")
    base_only = found.module in BASE_MODULES or (room(found.module) == "cli" and not found.function)
    return requirements(None) if base_only and not found.typing_only else requirements(None) | requirements("hf")


def test_third_party_imports_are_declared_dependencies() -> None:
    wrong = {
        str(found)
        for found in IMPORTS
        if (top := found.target.partition(".")[0]) not in PACKAGES
        and top not in sys.stdlib_module_names
        and top not in allowed_third_parties(found)
    }
    assert wrong == set()


def loaded_by(script: str) -> set[str]:
    """The top-level modules in memory after `script` has run in a process of its own."""
    script += "\nimport sys; print('MODULES', *sorted({name.partition('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.rpartition("MODULES ")[2].split())


HEAVY = {"torch", "transformers", "huggingface_hub", "vllm", "PIL", "tqdm", "hones_offline", "hones_serving"}
GOLDEN = ROOT / "tests" / "steer" / "golden" / "vqa.safetensors"


@pytest.mark.parametrize(
    "script",
    [
        "import hones_steer",
        "from hones_steer import Profile, ProfileStore, load_profile, save_profile, ModelIdentity, HonesError",
        "from hones_steer.cli import main; assert main(['--help']) == 0",
        f"from hones_steer.cli import main; assert main(['inspect', {str(GOLDEN)!r}]) == 0",
        f"from hones_steer.cli import main; assert main(['diff', {str(GOLDEN)!r}, {str(GOLDEN)!r}]) == 0",
        "from hones_steer.cli import main; assert main(['verify', '--help']) == 0",
    ],
)
def test_the_base_loads_no_framework(script: str) -> None:
    assert loaded_by(script) & HEAVY == set()


def test_importing_the_package_loads_not_even_numpy() -> None:
    assert "numpy" not in loaded_by("import hones_steer")
    assert "numpy" not in loaded_by("from hones_steer.cli import main; main(['--help'])")


def test_every_public_name_resolves_and_no_other() -> None:
    for name in hones_steer.__all__:
        assert getattr(hones_steer, name) is not None
        assert name in dir(hones_steer)
    with pytest.raises(AttributeError, match="has no attribute 'steerr'"):
        hones_steer.steerr  # noqa: B018
    # The lazy table, `__all__` and the TYPE_CHECKING block say the same.
    declared = {
        found.target.rpartition(".")[2]
        for found in IMPORTS
        if found.package == "hones_steer" and found.module == "__init__" and found.typing_only
    }
    assert declared | {"__version__"} == set(hones_steer.__all__)
    assert declared == hones_steer._HOME.keys()


def test_the_errors_are_one_tree() -> None:
    errors = [getattr(hones_steer, name) for name in hones_steer.__all__ if name.endswith("Error")]
    assert all(issubclass(error, hones_steer.HonesError) for error in errors)


def test_the_version_is_the_distributions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert hones_steer.__version__ == project["version"]


def test_every_command_can_be_loaded() -> None:
    for point in entry_points(group="hones.commands"):
        assert callable(point.load()), point.name


def test_what_is_large_was_looked_at() -> None:
    """CONTRIBUTING lists modules over 400 lines and functions over 60 lines or eight parameters, with the reason."""
    large = set()
    for folder in PACKAGES.values():
        for path in folder.rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            if source.count("\n") > 400:
                large.add(str(path.relative_to(ROOT)))
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    count = sum(argument.arg not in ("self", "cls") for argument in arguments)
                    if (node.end_lineno or 0) - node.lineno >= 60 or count > 8:
                        large.add(f"{node.name} in {path.relative_to(folder)}")
    text = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Prose and sizes")[2].partition("\n## ")[0]
    )
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    listed = {entry for row in rows for entry in re.findall(r"`([^`]+/[^`]+\.py)`$", row.strip())}
    listed |= {f"{name} in {path}" for row in rows for name, path in re.findall(r"`(\w+)` in `([^`]+)`", row)}
    listed -= {path for row in rows for _, path in re.findall(r"`(\w+)` in `([^`]+)`", row)}
    assert listed == large
