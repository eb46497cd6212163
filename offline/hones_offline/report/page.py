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
from hones_offline.report.sections import Section, build_sections
from hones_offline.report.summary import SUMMARY, read_summary
from hones_offline.report.tables import Cell, Column
from hones_offline.running.run_folder import json_bytes
from hones_steer import __version__
from hones_steer.errors import DataError
from hones_steer.files import write_atomically

TEMPLATE = "report.html.jinja"
SHADE = 55  # per cent of full colour behind a number, so that it stays readable
_WRITTEN = {"value": fixed, "change": change, "percent": percent, "number": number, "text": number}
_COLOURED = ("value", "change")


def report(argv: Sequence[str]) -> int:
    """Entry point of `hones report`."""
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
    found = read_summary(args.run)
    shown = build_sections(found)
    digest = hashlib.sha256((args.run / SUMMARY).read_bytes()).hexdigest()
    html, data = render(found, shown, digest).encode(), as_json(found, shown, digest)
    write_atomically(tables, json_bytes(data))
    write_atomically(page, html)
    if args.json:
        json.dump(data, sys.stdout, indent=1, sort_keys=True)
        print()
    else:
        missing = [section.title.lower() for section in shown if section.not_run]
        print(f"{page}: {len(html) / 1024:,.0f} KiB, {len(shown) - len(missing)} of {len(shown)} parts")
        print(f"{tables}: the same tables")
        if missing:
            print(f"not run: {', '.join(missing)}")
    return 0


def render(summary: Mapping[str, Any], shown: Sequence[Section], digest: str) -> str:
    """The page, of a checked summary whose file has this sha256. Whatever text is in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"written": _written, "shade": _shade}
    return environment.get_template(TEMPLATE).render(
        summary=summary, sections=shown, digest=digest, version=__version__, number=number
    )


def as_json(summary: Mapping[str, Any], shown: Sequence[Section], digest: str) -> dict[str, Any]:
    """The page's tables as they are, unrounded, with what decided them."""
    kept = ("title", "created", "hones_steer", "model", "settings", "seconds")
    return {
        **{name: summary[name] for name in kept if name in summary},
        "summary_sha256": digest,
        "sections": [section.as_json() for section in shown],
    }


def _check_names(page: Path, tables: Path, run: Path) -> None:
    if page == tables:
        raise DataError(f"--out {page} is where the tables would go; give the page another ending, such as .html")
    for file in (page, tables):
        if file.is_dir():
            raise DataError(f"{file} is a folder; give a file name, such as {file / 'report.html'}")
        if file.resolve() == (run / SUMMARY).resolve():
            raise DataError(f"--out {page} would overwrite {run / SUMMARY}; give the page another name")


def _written(value: float, column: Column) -> str:
    return _WRITTEN[column.kind](value)


def _shade(cell: Cell, column: Column, full: float | None) -> str:
    """A cell's colour and its strength, as style; nothing for cells without one."""
    value = cell["value"] if isinstance(cell, Mapping) else cell
    if full is None or column.kind not in _COLOURED or not isinstance(value, int | float):
        return ""
    colour = "ours" if column.kind == "value" else "negative" if value < 0 else "positive"
    return f"--shade: {SHADE * min(abs(value) / full, 1):.0f}%; --colour: var(--{colour})"
