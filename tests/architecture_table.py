"""The table of docs/architectures.md, made by trying every architecture on a tiny random model.

`python tests/architecture_table.py` tries what has not been tried with these versions and writes the table; a run that
was stopped goes on. Each architecture is tried in a process of its own, which may crash or run out of time: then that
is the reason in its cell. Exits with 2 for a name or column that there is not.
"""

import argparse
import dataclasses
import json
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tiny_architectures
import torch
from architecture_checks import COLUMNS, Cell, judged, shortened, vllm_cell
from tiny_architectures import Architecture, architectures

from hones_steer.files import write_atomically

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architectures.md"
RESULTS = ROOT / ".test-all" / "architectures.json"
BEGIN, END = "<!-- table: python tests/architecture_table.py -->", "<!-- end of the table -->"
HEADINGS = {
    "steer": "steer",
    "text": "attribute text",
    "image": "attribute image",
    "compile": "compile",
    "vllm": "vLLM",
}
SECONDS = 120
"""Processor time that one architecture may take, and with `_WAIT` times as much by the clock."""
_WAIT = 20
_MEMORY = 8 << 30

Row = dict[str, Cell]
"""Cells by column."""


def try_row(architecture: Architecture, columns: Iterable[str], seconds: int = SECONDS) -> Row:
    """Cells of one architecture, tried in a process forked from this one."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(architecture, tuple(columns), theirs, seconds))
    process.start()
    theirs.close()
    cells: Row = {}
    end = time.monotonic() + _WAIT * seconds
    try:
        while ours.poll(max(0.0, end - time.monotonic())):
            column, cell = ours.recv()
            cells[column] = cell
        reason = f"not done after {_WAIT * seconds} seconds"
        process.kill()
    except EOFError:
        process.join()
        reason = "" if process.exitcode == 0 else f"its process ended with code {process.exitcode}"
    process.join()
    return cells | {column: Cell(False, reason) for column in columns if column not in cells}


def _child(architecture: Architecture, columns: tuple[str, ...], pipe: Connection, seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for column, cell in cells_of(architecture, columns):
        pipe.send((column, cell))


def cells_of(architecture: Architecture, columns: Iterable[str]) -> Iterable[tuple[str, Cell]]:
    """Cells of one architecture, tried in this process."""
    try:
        model: Any = tiny_architectures.build(architecture)
        failure = None
    except Exception as error:  # noqa: BLE001 - a row that cannot be built says why
        model, failure = None, f"not built: {type(error).__name__}: {error}"
    for column in columns:
        if column == "vllm":
            yield column, vllm_cell(architecture, model)
        elif column == "image" and not architecture.image:
            yield column, Cell(None)
        elif failure:
            yield column, Cell(False, failure)
        else:
            yield column, judged(lambda column=column: COLUMNS[column](tiny_architectures.build(architecture)))


class Results:
    """Cells by the name of their row, in a file that is written after each row."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.versions = {name: version(name) for name in ("transformers", "torch", "hones-steer")}
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.rows: dict[str, Row] = {
            name: {column: Cell(**cell) for column, cell in cells.items()}
            for name, cells in kept.get("rows", {}).items()
            if kept["versions"] == self.versions
        }

    def add(self, name: str, cells: Row) -> None:
        """Keep a row's cells beside those that it has."""
        self.rows[name] = self.rows.get(name, {}) | cells
        self._file.parent.mkdir(exist_ok=True)
        write_atomically(self._file, json.dumps(self.as_json(), indent=1).encode())

    def as_json(self) -> dict[str, Any]:
        """Versions and cells."""
        rows = {
            name: {column: dataclasses.asdict(cell) for column, cell in cells.items()}
            for name, cells in sorted(self.rows.items())
        }
        return {"versions": self.versions, "rows": rows}


def shown_row(cells: Row, columns: Iterable[str]) -> list[str]:
    """Cells of a row as the table shows them, with the reason of a no where the table has its number."""
    return [_shown(cells.get(column)) for column in columns]


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "not tried"
    if cell == Cell(None):
        return "–"
    if cell.yes is False:
        return f"no: {_escaped(shortened(cell.said))}"
    if cell.yes is None:
        return cell.said
    return f"yes ({_escaped(cell.said)})" if cell.said else "yes"


def table(rows: Mapping[str, Row]) -> str:
    """The table in Markdown, reasons under it by number."""
    reasons: dict[str, int] = {}

    def numbered(text: str) -> str:
        no, _, reason = text.partition(": ")
        return f"no [{reasons.setdefault(reason, len(reasons) + 1)}]" if no == "no" else text

    lines = ["| | " + " | ".join(HEADINGS.values()) + " |", "|---" * (len(HEADINGS) + 1) + "|"]
    for name in sorted(rows, key=str.lower):
        lines.append(f"| {name} | " + " | ".join(map(numbered, shown_row(rows[name], HEADINGS))) + " |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())])


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")


def write_page(rows: Mapping[str, Row]) -> None:
    """Put the table between its marks in docs/architectures.md."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_atomically(PAGE, f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}".encode())


def main(argv: list[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="try these rows, again if they were tried")
    parser.add_argument("--columns", nargs="+", metavar="COLUMN", choices=HEADINGS, default=list(HEADINGS))
    parser.add_argument("--again", action="store_true", help="try again what was tried")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of what was tried (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, and leave the page alone")
    options = parser.parse_args(argv)
    every = {row.name: row for row in architectures()}
    if unknown := [name for name in options.only or () if name not in every]:
        print(f"no such row: {', '.join(unknown)}; a row is named by its model type, as llama", file=sys.stderr)
        return 2
    results = Results(options.results)
    chosen = options.only or list(every)
    again = options.again or bool(options.only)
    todo = {
        name: columns
        for name in chosen
        if (columns := [c for c in options.columns if again or c not in results.rows.get(name, {})])
    }
    start = time.monotonic()
    for done, (name, columns) in enumerate(todo.items(), 1):
        cells = try_row(every[name], columns)
        results.add(name, cells)
        left = (time.monotonic() - start) / done * (len(todo) - done) / 60
        said = ", ".join(f"{column} {_word(cell)}" for column, cell in cells.items())
        print(f"[{done}/{len(todo)}] {name}: {said}; {left:.0f} min left", file=sys.stderr, flush=True)
    shown = {name: results.rows[name] for name in every if name in results.rows}
    if options.json:
        print(json.dumps(results.as_json(), indent=1))
    elif set(shown) == set(every):
        write_page(shown)
    return 0


def _word(cell: Cell) -> str:
    word = {True: "yes", False: "no", None: "–"}[cell.yes]
    return f"{word} ({shortened(cell.said)})" if cell.said else word


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
