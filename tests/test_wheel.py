"""The wheel and the source package: three packages, their types, the embedded model, and the commands."""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "steer" / "golden" / "vqa.safetensors"


def build(source: Path, target: str, folder: Path) -> Path:
    """The package of `source` of the kind "wheel" or "sdist", built into `folder`."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next(folder.glob({"wheel": "*.whl", "sdist": "*.tar.gz"}[target]))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that was empty, and into which pip has installed the wheel without extras."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
    command = [*pip, "install", "--constraint", str(ROOT / "constraints.txt"), "--no-compile", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def run(command: list[str | Path], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command outside the repository and without its packages."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_it_holds_every_module_and_nothing_else(wheel: Path) -> None:
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        str(file.relative_to(root))
        for root, package in (
            (ROOT, "hones_steer"),
            (ROOT / "offline", "hones_offline"),
            (ROOT / "serving", "hones_serving"),
        )
        for file in (root / package).rglob("*")
        if file.suffix in (".py", ".css", ".html", ".jinja") or file.name in ("py.typed", "adapters.json")
    }
    checkpoint = ROOT / "examples" / "tiny_vlm" / "checkpoint"
    model = {f"hones_offline/tiny_vlm/{file.name}" for file in checkpoint.iterdir()}
    assert shipped == sources | model


def test_the_installed_package_finds_its_own_model(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from hones_offline.running.embedded import checkpoint, load_tiny_vlm\n"
        "model, processor = load_tiny_vlm()\n"
        "print(checkpoint())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert Path(done.stdout.strip().splitlines()[-1]) == tmp_path / "site" / "hones_offline" / "tiny_vlm"


def test_it_brings_the_commands_and_the_extras(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    commands = archive.read(entry_points).decode()
    steer = ("inspect", "diff", "verify", "export", "import", "push", "pull")
    for name in (*steer, "learn", "attribute", "fit", "evaluate", "demo", "report", "serve", "route"):
        assert f"\n{name} = " in commands
    metadata = archive.read(entry_points.replace("entry_points.txt", "METADATA")).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert sorted(line.split()[1].partition(">")[0] for line in required) == ["numpy", "safetensors"]
    for extra in ("hf", "offline", "peft", "serve", "vllm", "docs", "dev"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_both_packages_are_fit_to_be_published(wheel: Path, sdist: Path) -> None:
    """Twine finds the metadata whole, and the description one that can be rendered."""
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_source_package_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    rebuilt = build(source, "wheel", tmp_path)
    assert rebuilt.read_bytes() == wheel.read_bytes()


def test_without_extras_a_profile_is_read_and_inspected_without_torch(installed: Path, tmp_path: Path) -> None:
    code = f"""
import importlib.util, json, sys
from hones_steer import ProfileStore, load_profile, save_profile
profile = load_profile({str(GOLDEN)!r})
save_profile(profile * 0.5, "vqa.safetensors")
half = ProfileStore(".").resolve("vqa")
there = [name for name in ("torch", "transformers", "yaml", "PIL") if importlib.util.find_spec(name)]
print(json.dumps([profile.digest, half.num_neurons, there]))
"""
    read = run([installed / "python", "-W", "error", "-c", code], tmp_path)
    assert read.returncode == 0, read.stderr
    digest, neurons, there = json.loads(read.stdout)
    assert (neurons, there) == (5, [])
    inspected = run([installed / "hones", "inspect", str(GOLDEN), "--json"], tmp_path)
    assert inspected.returncode == 0, inspected.stderr
    assert json.loads(inspected.stdout)["digest"] == digest
    assert run([installed / "hones", "diff", str(GOLDEN), "vqa.safetensors"], tmp_path).returncode == 1
    assert "  inspect " in run([installed / "hones", "--help"], tmp_path).stdout


@pytest.mark.parametrize(
    ("command", "extra"),
    [("verify PROFILE m", "hf"), ("demo", "offline"), ("serve m --profiles . --engine transformers", "serve")],
)
def test_a_command_whose_extra_is_missing_names_it(command: str, extra: str, installed: Path, tmp_path: Path) -> None:
    arguments = [str(GOLDEN) if word == "PROFILE" else word for word in command.split()]
    done = run([installed / "hones", *arguments], tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith(f"run: pip install 'hones-steer[{extra}]'\n")
    assert len(done.stderr.splitlines()) == 1
