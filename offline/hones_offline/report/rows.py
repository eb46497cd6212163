"""Rows of a checked summary: one measurement each, in the order in which the report shows them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hones_offline.report.titles import place

Summary = Mapping[str, Any]
"""A run's summary, as `read_summary` returns it."""
Row = Mapping[str, Any]


def rows_of(summary: Summary, key: str) -> list[Row]:
    """The rows under a key of the summary; where they are keyed by task, the task is in each as `task`."""
    part = summary.get(key, ())
    if key in ("tasks", "heads"):
        return [{**row, "task": task} for task, row in part.items()] if part else []
    if key == "cross":
        return [part] if part else []
    if key in ("finding", "selections"):
        return [row for rows in by_task(part["rows"]).values() for row in rows] if part else []
    if key == "steering":
        return [row for rows in by_task(part).values() for row in rows]
    if key == "strength":
        return sorted(part, key=lambda row: (row["task"], row["strength"]))
    return list(part)


def by_task(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Each task's rows, by method in the report's order."""
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row["task"]].append(row)
    return {task: sorted(members, key=lambda row: place(row.get("method", ""))) for task, members in grouped.items()}


def main_size_rows(summary: Summary) -> list[Row]:
    """Each task's masking rows at the summary's fraction or, where it was not masked at that size, its first row's."""
    main = []
    for rows in by_task(rows_of(summary, "masking")).values():
        sizes = [row["fraction"] for row in rows]
        size = summary["fraction"] if summary.get("fraction") in sizes else sizes[0]
        main += [row for row in rows if row["fraction"] == size]
    return main


def bank_sizes(summary: Summary) -> set[float]:
    """Every size of bank that was masked, as a share of all FFN neurons."""
    return {row["fraction"] for row in rows_of(summary, "masking")}


def highest_head(scores: Sequence[Sequence[float]]) -> tuple[float, int, int]:
    """The highest score of `scores` (layers x heads), with its layer and head; of equal ones the last."""
    return max((score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row))


def numbers_of_seeds(rows: Iterable[Row]) -> list[int]:
    """The distinct numbers of seeds that rows say they have, ascending."""
    return sorted({row["seeds"] for row in rows if "seeds" in row})
