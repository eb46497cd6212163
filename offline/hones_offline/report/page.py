"""`hones report`: a run folder's numbers as one self-contained HTML page, and as JSON beside it.

The page asks nothing of the network and runs no script; its own policy forbids both. The same summary gives the same
bytes.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hones_offline.report.numbers import change, fixed, number, percent
from hones_offline.report.rows import Summary
from hones_offline.report.sections import Section, build_sections
from hones_offline.report.summary import SUMMARY, read_summary
from hones_offline.report.tables import Cell, Column
from hones_offline.running.run_folder import json_bytes
from hones_steer import __version__
from hones_steer.errors import DataError
from hones_steer.files import write_atomically

TEMPLATE = "report.html.jinja"
SHADE = 55  # per cent of full color behind a number, so that it stays readable
_FORMATS = {"value": fixed, "change": change, "percent": percent, "number": number, "text": number}
_SHADED_KINDS = ("value", "change")


def report(argv: Sequence[str]) -> int:
    """Run `hones report` with these arguments; returns the exit code.

    Raises:
        DataError: the run folder has no sound summary, or a file to write is a folder or the summary itself.
    """
    parser = argparse.ArgumentParser(
        prog="hones report",
        description="Make one self-contained HTML page of what a run measured: heads, neurons, masking, steering and "
        "their baselines, each with n, seeds and intervals. The same tables are written as JSON beside the page. Parts "
        "that were not run are named.",
        epilog="example: hones demo --out runs/demo && hones report runs/demo",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help=f"run folder that holds {SUMMARY}, as hones demo writes it"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page; its tables go beside it as .json (default: RUN/report.html)"
    )
    parser.add_argument("--json", action="store_true", help="print the tables as JSON, too")
    args = parser.parse_args(argv)
    page = args.out or args.run / "report.html"
    tables = page.with_suffix(".json")
    _check_names(page, tables, args.run)
    summary = read_summary(args.run)
    sections = build_sections(summary)
    digest = hashlib.sha256((args.run / SUMMARY).read_bytes()).hexdigest()
    html, data = render(summary, sections, digest).encode(), as_json(summary, sections, digest)
    write_atomically(tables, json_bytes(data))
    write_atomically(page, html)
    if args.json:
        json.dump(data, sys.stdout, indent=1, sort_keys=True)
        print()
    else:
        missing = [section.title.lower() for section in sections if section.not_run]
        print(f"{page}: {len(html) / 1024:,.0f} KiB, {len(sections) - len(missing)} of {len(sections)} parts")
        print(f"{tables}: the same tables")
        if missing:
            print(f"not run: {', '.join(missing)}")
    return 0


def render(summary: Summary, sections: Sequence[Section], digest: str) -> str:
    """The HTML of a checked summary and its sections; `digest` is the file's sha256. All text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"formatted": _formatted, "shade": _shade}
    return environment.get_template(TEMPLATE).render(
        summary=summary, sections=sections, digest=digest, version=__version__, number=number
    )


def as_json(summary: Summary, sections: Sequence[Section], digest: str) -> dict[str, Any]:
    """The page's tables, unrounded, with the facts of the run that decided them."""
    facts = ("title", "created", "hones_steer", "model", "settings", "seconds")
    return {
        **{name: summary[name] for name in facts if name in summary},
        "summary_sha256": digest,
        "sections": [section.as_json() for section in sections],
    }


def _check_names(page: Path, tables: Path, run: Path) -> None:
    """Raise DataError if page or tables would take each other's place, a folder's or the summary's."""
    if page == tables:
        raise DataError(f"--out {page} is where the tables would go; give the page another ending, such as .html")
    for file in (page, tables):
        if file.is_dir():
            raise DataError(f"{file} is a folder; give a file name, such as {file / 'report.html'}")
        if file.resolve() == (run / SUMMARY).resolve():
            raise DataError(f"--out {page} would overwrite {run / SUMMARY}; give the page another name")


def _formatted(value: float, column: Column) -> str:
    return _FORMATS[column.kind](value)


def _shade(cell: Cell, column: Column, full: float | None) -> str:
    """A cell's color and its strength as CSS, full strength at `full`; empty for cells that are not shaded."""
    value = cell["value"] if isinstance(cell, Mapping) else cell
    if full is None or column.kind not in _SHADED_KINDS or not isinstance(value, int | float):
        return ""
    color = "ours" if column.kind == "value" else "negative" if value < 0 else "positive"
    return f"--shade: {SHADE * min(abs(value) / full, 1):.0f}%; --colour: var(--{color})"
