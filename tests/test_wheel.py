"""What `pip install` brings: three packages, their types, the embedded model, and the commands."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


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
        if file.suffix in (".py", ".css", ".html", ".jinja") or file.name == "py.typed"
    }
    checkpoint = ROOT / "examples" / "tiny_vlm" / "checkpoint"
    model = {f"hones_offline/tiny_vlm/{file.name}" for file in checkpoint.iterdir()}
    assert shipped == sources | model


def test_the_installed_package_finds_its_own_model(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from hones_offline.embedded import checkpoint, load_tiny_vlm\n"
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
    for name in (*steer, "attribute", "fit", "evaluate", "demo", "report", "serve", "route"):
        assert f"\n{name} = " in commands
    metadata = archive.read(entry_points.replace("entry_points.txt", "METADATA")).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert sorted(line.split()[1].partition(">")[0] for line in required) == ["numpy", "safetensors"]
    for extra in ("hf", "offline", "peft", "dev"):
        assert f"Provides-Extra: {extra}\n" in metadata
