"""Parsers, tables and JSON that the commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hones_steer.profile import Profile


def command_parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    """The parser of one command, whose help ends with an example."""
    return argparse.ArgumentParser(
        prog=f"hones {name}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def print_json(value: object) -> None:
    """Print JSON as every `--json` does: indented, with sorted keys."""
    print(json.dumps(value, indent=2, sort_keys=True))


def report_written(files: Sequence[tuple[Profile, Path]], origin: dict[str, str], as_json: bool) -> None:
    """Say which profiles were written where; `origin` is the `repo` and `commit` they come from, or empty."""
    if as_json:
        print_json({**origin, "profiles": {p.task: {"file": str(file), "digest": p.digest} for p, file in files}})
        return
    for profile, file in files:
        print(f"{file}: {profile.task!r}, {profile.num_neurons:,} neurons, digest {profile.short_digest}")
    if origin:
        print(f"from hub:{origin['repo']}@{origin['commit']}")


def printable(text: str) -> str:
    """The text with everything that a terminal would not print escaped: a file's text may carry control codes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a table: one row per name, one column per key of any row, aligned."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [["", *map(printable, columns)]]
    for name, row in rows.items():
        cells.append([printable(name), *(shown(row[key]) if key in row else "" for key in columns)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns) + 1)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]


def facts(values: Mapping[str, object], indent: str) -> list[str]:
    """Lines of keys and values, aligned."""
    width = max((len(printable(key)) for key in values), default=0)
    return [f"{indent}{printable(key):<{width}}  {shown(value)}" for key, value in values.items()]


def shown(value: object) -> str:
    """A JSON value as one line of text, numbers with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and all(isinstance(item, float) for item in value):
        return f"[{', '.join(map(shown, value))}]"
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
