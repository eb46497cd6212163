"""Several API servers before one engine: `python -m hones_serving.vllm.servers` is `vllm serve`, in every build.

The process that runs this starts the engine and, as processes of their own, the API servers. Before it does, it makes
the folder of what they agree on (`hones_serving.shared_state`), and reads the profiles and the routing file into it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

from hones_serving.registry import read_folder
from hones_serving.routing_file import load_plan
from hones_serving.settings import STATE_DIR, Settings
from hones_serving.shared_registry import write_first_state
from hones_serving.shared_state import ROUTING


class StateFolder:
    """A new folder that holds what API servers agree on at their start; it goes when the process ends that made it.

    `path` is where it is.

    Raises:
        ProfileError: a profile is broken, or its file has a name that no task can have.
        RoutingError: the routing file is wrong.
        SharedStateError: the profiles are too large together, or the folder cannot be written.
    """

    def __init__(self, settings: Settings) -> None:
        profiles = read_folder(settings.profiles)
        self._folder = tempfile.TemporaryDirectory(prefix="hones-")  # which only this user can enter
        self.path = Path(self._folder.name)
        # What cleans temporary folders up by their age (systemd-tmpfiles) leaves a locked one alone.
        self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        write_first_state(self.path, profiles)
        if settings.routing is not None:
            load_plan(settings.routing, profiles)
            (self.path / ROUTING).write_bytes(settings.routing.read_bytes())


def install() -> None:
    """Wrap vLLM's start of API servers: they get a folder to agree in, and find it in HONES_STATE_DIR."""
    from vllm.v1.utils import APIServerProcessManager

    from hones_serving.vllm.front import wrap

    def start(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        if settings := Settings.from_env():
            self.hones_state = StateFolder(settings)
            os.environ[STATE_DIR] = str(self.hones_state.path)
        original(self, *args, **kwargs)

    wrap(APIServerProcessManager, "__init__", start)


def main() -> None:
    """Be ``vllm serve`` with the arguments of this process."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # The `vllm` command itself asks for the version of a package named vllm, which not every build is.
    cli_env_setup()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args()
    configure_logging_from_args(arguments)
    validate_parsed_serve_args(arguments)
    ServeSubcommand.cmd(arguments)


if __name__ == "__main__":
    main()
