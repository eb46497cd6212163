"""The command ``hones``: runs the command asked for and turns errors into one line and an exit code.

Commands are entry points of the group ``hones.commands``: name -> ``callable(argv) -> exit code``, each with
its own argparse parser. Only the one that is called is imported, so this module knows no package above it and
``hones --help`` is instant. Exit codes: 0 done, 1 the answer is no (or interrupted), 2 bad input or usage.
"""

from __future__ import annotations

import difflib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import TextIO

from hones_steer._version import __version__
from hones_steer.errors import HonesError

GROUP = "hones.commands"

OK, NO, BAD_INPUT = 0, 1, 2

_SUMMARIES = {
    "attribute": "find the neurons that matter for a task",
    "fit": "learn scales for a task's neurons and write its profile",
    "evaluate": "measure a task with and without steering or masking",
    "report": "one page, and JSON, of what a run measured",
    "inspect": "explain a profile: task, model, neurons per layer, scales, evidence",
    "diff": "compare two profiles",
    "verify": "check that a profile fits a model and steers it",
    "export": "write a profile as a PEFT adapter, a LoRA or a merged checkpoint",
    "import": "read an IA3 adapter of PEFT as a profile",
    "push": "publish profiles on the Hugging Face Hub",
    "pull": "download profiles from the Hugging Face Hub and check them",
    "serve": "serve a model over HTTP, each request steered by its task",
    "route": "show which steering a request would get from a server, and why",
    "demo": "the whole method on the small model that ships with this package",
}

_USAGE = """\
usage: hones [--debug] COMMAND ...
       hones --help | --version

Find, learn, inspect and apply per-task neuron scalings ("profiles") of vision-language models.

commands:
{commands}

options:
  --debug    show the traceback of an error
  --version  show the version
  --help     show this text; `hones COMMAND --help` explains a command

example:
  hones inspect profiles/vqa.safetensors
"""

# The extra that brings what the commands of a package import.
_EXTRAS = {"hones_steer": "hf", "hones_offline": "offline", "hones_serving": "serve"}
_EXTRA_MODULES = {
    "torch",
    "transformers",
    "huggingface_hub",
    "PIL",
    "jinja2",
    "rapidfuzz",
    "tqdm",
    "yaml",
    "re2",
    "prometheus_client",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``hones`` with `argv` (default: the command line's) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = arguments[:1] == ["--debug"]
    if debug:
        arguments.pop(0)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is no error
    try:
        code = _dispatch(arguments, debug)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO
    return code


def _dispatch(arguments: list[str], debug: bool) -> int:
    commands = {point.name: point for point in entry_points(group=GROUP)}
    if not arguments:
        sys.stderr.write(_usage(commands))
        return BAD_INPUT
    name, *rest = arguments
    if name in ("-h", "--help"):
        sys.stdout.write(_usage(commands))
        return OK
    if name == "--version":
        print(f"hones-steer {__version__}")
        return OK
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "see `hones --help`"
        return _fail("hones", f"there is no command {name!r}; {hint}")
    return _run(commands[name], rest, debug)


def _usage(commands: dict[str, EntryPoint]) -> str:
    order = [*(name for name in _SUMMARIES if name in commands), *sorted(commands.keys() - _SUMMARIES.keys())]
    width = max(map(len, order), default=0)
    lines = [f"  {name:<{width}}  {_SUMMARIES.get(name, commands[name].value)}" for name in order]
    return _USAGE.format(commands="\n".join(lines))


def _run(point: EntryPoint, arguments: list[str], debug: bool) -> int:
    prog = f"hones {point.name}"
    try:
        with _one_line_warnings(prog):
            command: Callable[[Sequence[str]], int] = point.load()
            return command(arguments)
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a usage error
        return _fail(prog, stop.code) if isinstance(stop.code, str) else int(stop.code or OK)
    except KeyboardInterrupt:
        _show_traceback(debug)
        sys.stderr.write(f"{prog}: interrupted; run the same command again to resume\n")
        return NO
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(point.module.partition(".")[0])
        if missing not in _EXTRA_MODULES or extra is None:
            raise
        _show_traceback(debug)
        return _fail(prog, f"{missing} is not installed; run: pip install 'hones-steer[{extra}]'")
    except HonesError as error:
        _show_traceback(debug)
        return _fail(prog, str(error))
    except OSError as error:
        _show_traceback(debug)
        where = f"{error.filename}: " if error.filename is not None else ""
        return _fail(prog, f"{where}{error.strerror or error}")


def _fail(prog: str, message: str) -> int:
    sys.stderr.write(f"{prog}: error: {' '.join(message.split())}\n")
    return BAD_INPUT


def _show_traceback(debug: bool) -> None:
    if debug:
        traceback.print_exc()


@contextmanager
def _one_line_warnings(prog: str) -> Iterator[None]:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del category, filename, lineno, line
        (file or sys.stderr).write(f"{prog}: warning: {' '.join(str(message).split())}\n")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
