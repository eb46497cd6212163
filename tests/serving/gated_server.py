"""`hones serve MODEL --engine transformers`, whose model waits before each forward while a file is there.

    python gated_server.py FILE MODEL --engine transformers --profiles DIR ...

So a test can look at what is in flight. While there is a FILE.loading, the model waits in the midst of being loaded,
and says so in that file.
"""

import os
import sys
import time
from pathlib import Path

from hones_serving.commands import launch
from hones_serving.transformers_server import command
from torch.nn.modules.module import register_module_forward_pre_hook, register_module_module_registration_hook
from transformers import GenerationMixin


def main() -> None:
    gate = Path(sys.argv[1])
    loading = gate.with_name(gate.name + ".loading")

    def wait_while_loading(*_: object) -> None:
        if loading.exists():
            loading.write_text("waiting", encoding="utf-8")
        while loading.exists():
            time.sleep(0.005)

    def wait(module: object, _inputs: object) -> None:
        while isinstance(module, GenerationMixin) and gate.exists():
            time.sleep(0.005)

    arguments, environment = launch(sys.argv[2:], os.environ, ())
    register_module_forward_pre_hook(wait)
    register_module_module_registration_hook(wait_while_loading)
    command.main(arguments[arguments.index("--model") :], environment)


if __name__ == "__main__":
    main()
