"""The backends of the tests' Triton: one for CPUs, whose kernels Triton interprets instead of compiling them.

vLLM's V2 model runner needs Triton's kernels, and takes a Triton without a CPU backend for none. `install_vllm.py` puts
this file in the place of Triton's own list of backends, so that it works in every process. Triton asks for the variable
after it has looked for backends.
"""

import os
from types import SimpleNamespace

from triton.backends.compiler import BaseBackend
from triton.backends.driver import DriverBase

__all__ = ["BaseBackend", "DriverBase", "backends"]

os.environ["TRITON_INTERPRET"] = "1"


class Interpreter(DriverBase):
    """A driver that is there and is asked for nothing else: abstract, so Triton cannot make one by mistake."""

    @classmethod
    def is_active(cls) -> bool:
        """Whether this driver can run kernels."""
        return True


backends = {"cpu": SimpleNamespace(driver=Interpreter, compiler=None)}
