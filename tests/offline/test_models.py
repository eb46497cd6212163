"""Loading models for the commands, and the memory that they keep."""

import subprocess
import sys

import pytest

LAYERS = """
import resource, sys, torch
from hones_offline.running.models import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for layer in range(60):
    if layer == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a matter of glibc")
def test_freed_memory_is_kept_for_the_next_layer() -> None:
    """Otherwise every layer's activations touch new pages, which may cost as much as their arithmetic."""

    def faults(how: str) -> int:
        command = [sys.executable, "-c", LAYERS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("kept") < 10
    assert faults("not kept") >= 50
