"""The command line ``hones``.

`program` finds the command asked for and runs it; every other module but `streams` and `output` holds one command, or
two that belong together. A new command is one function ``callable(argv) -> exit code`` and one line under
``hones.commands`` in `pyproject.toml`.
"""

from hones_steer.cli.program import main

__all__ = ["main"]
