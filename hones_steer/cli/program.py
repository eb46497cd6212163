"""The command ``hones``: runs the command asked for and turns errors into one line and an exit code.

Commands are entry points of the group ``hones.commands``: name -> ``callable(argv) -> exit code``, each with its own
argparse parser. Only the one that is called is imported, so this module knows no package above it, and ``hones --help``
takes no time. A command that can be interrupted and resumed says so in a note on the KeyboardInterrupt that it lets
through. The exit codes are in `_USAGE`.
"""

from __future__ import annotations

import difflib
import io
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points

from hones_steer._version import __version__
from hones_steer.cli.streams import discard, flush_output, one_line_warnings, open_closed_streams, reader_left, say
from hones_steer.errors import HonesError

GROUP = "hones.commands"

OK, NO, BAD_INPUT = 0, 1, 2
INTERRUPTED, READER_LEFT = 130, 141  # 128 + SIGINT and SIGPIPE: a shell's codes for a program that they end

_SUMMARIES = {
    "learn": "from a task's data to a measured profile, in one command",
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

exit codes:
  0    done
  1    the answer is no: the profiles differ, the profile does not fit
  2    bad input or usage, in one line on standard error
  130  interrupted by Ctrl-C
  141  the reader of the output has left (`| head`)

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
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is no error
    code = _outcome(arguments, debug)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            discard(stream)  # or Python would complain when it flushes at exit
    return code


def _outcome(arguments: list[str], debug: bool) -> int:
    """Run the command and write all its output, or one line that says why not; return the exit code."""
    commands = {point.name: point for point in entry_points(group=GROUP)}
    point = commands.get(arguments[0]) if arguments else None
    prog = "hones" if point is None else f"hones {point.name}"
    try:
        if point is None:
            code = _without_command(arguments, commands)
        else:
            with one_line_warnings(prog):
                code = _run(point, prog, arguments[1:])
        flush_output()
    except KeyboardInterrupt as interrupt:
        _show_traceback(debug)
        say("; ".join([f"{prog}: interrupted", *getattr(interrupt, "__notes__", [])]))
        return INTERRUPTED
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = None if point is None else _EXTRAS.get(point.module.partition(".")[0])
        if missing not in _EXTRA_MODULES or extra is None:
            raise
        _show_traceback(debug)
        return _fail(prog, f"{missing} is not installed; run: pip install 'hones-steer[{extra}]'")
    except HonesError as error:
        _show_traceback(debug)
        return _fail(prog, str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and (reader_left(sys.stdout) or reader_left(sys.stderr)):
            return READER_LEFT
        _show_traceback(debug)
        where = f"{error.filename}: " if error.filename is not None else ""
        return _fail(prog, f"{where}{error.strerror or error}")
    return code


def _without_command(arguments: list[str], commands: dict[str, EntryPoint]) -> int:
    if not arguments:
        say(_usage(commands))
        return BAD_INPUT
    name = arguments[0]
    if name in ("-h", "--help"):
        print(_usage(commands))
        return OK
    if name == "--version":
        print(f"hones-steer {__version__}")
        return OK
    close = difflib.get_close_matches(name, commands, n=1)
    hint = f"did you mean '{close[0]}'?" if close else "see `hones --help`"
    return _fail("hones", f"there is no command {name!r}; {hint}")


def _run(point: EntryPoint, prog: str, arguments: list[str]) -> int:
    try:
        command: Callable[[Sequence[str]], int] = point.load()
        return command(arguments)
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a usage error
        return _fail(prog, stop.code) if isinstance(stop.code, str) else int(stop.code or OK)


def _usage(commands: dict[str, EntryPoint]) -> str:
    order = [*(name for name in _SUMMARIES if name in commands), *sorted(commands.keys() - _SUMMARIES.keys())]
    width = max(map(len, order), default=0)
    lines = [f"  {name:<{width}}  {_SUMMARIES.get(name, commands[name].value)}" for name in order]
    return _USAGE.format(commands="\n".join(lines)).rstrip()


def _fail(prog: str, message: str) -> int:
    say(f"{prog}: error: {' '.join(message.split())}")
    return BAD_INPUT


def _show_traceback(debug: bool) -> None:
    if debug:
        traceback.print_exc()
