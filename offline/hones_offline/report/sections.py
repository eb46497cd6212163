"""Sections of the report: `SECTIONS` lists them in the page's order and says what each is made of.

Page and JSON are made of the same `Section`s, so they hold the same numbers. A section that was not run says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hones_offline.report import figures, tables
from hones_offline.report.figures import Figure
from hones_offline.report.numbers import percent
from hones_offline.report.rows import Summary, bank_sizes, numbers_of_seeds, rows_of
from hones_offline.report.summary import unknown_keys
from hones_offline.report.tables import Table
from hones_offline.report.titles import meanings


@dataclass(frozen=True)
class Section:
    """A part of the report; it rests on so many `examples` of the `split`, task by task."""

    name: str
    title: str
    explanation: str
    not_run: str | None = None
    split: str = "test"
    examples: Mapping[str, int] = field(default_factory=dict)
    seeds: Sequence[int] | None = ()
    """Numbers of seeds that occur; None where nothing is drawn."""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()

    @property
    def intervals(self) -> bool:
        """Whether any number has a 95% interval."""
        return any(table.has_intervals for table in self.tables)

    @property
    def basis(self) -> str:
        """Examples, seeds and intervals in one line."""
        counts = sorted(set(self.examples.values()))
        each = ", ".join(f"{task} {n:,}" for task, n in self.examples.items())
        parts = [f"n = {counts[0]:,} {self.split} examples of each task" if len(counts) == 1 else ""]
        parts += [f"n = {counts[0]:,}–{counts[-1]:,} {self.split} examples ({each})" if len(counts) > 1 else ""]
        parts += ["" if counts else "n not recorded"]
        if self.seeds is not None:
            plural = "" if list(self.seeds) == [1] else "s"
            parts += [f"{'–'.join(map(str, self.seeds))} seed{plural} of data" if self.seeds else "seeds not recorded"]
        parts += ["95% intervals in brackets" if self.intervals else "no intervals"]
        return " · ".join(filter(None, parts))

    def as_json(self) -> dict[str, Any]:
        """The section as `hones report --json` writes it."""
        if self.not_run:
            return {"name": self.name, "title": self.title, "what": self.explanation, "not_run": self.not_run}
        return {
            "name": self.name,
            "title": self.title,
            "what": self.explanation,
            "n": {"split": self.split, "examples": dict(self.examples)},
            "seeds": None if self.seeds is None else list(self.seeds),
            "intervals": "95%" if self.intervals else None,
            "notes": list(self.notes),
            "tables": [
                {"caption": t.caption, "columns": [c.title for c in t.columns], "rows": [list(row) for row in t.rows]}
                for t in self.tables
            ],
        }


@dataclass(frozen=True)
class Specification:
    """One section's definition: its text, the key of the summary it needs, its basis, the functions that draw it."""

    name: str
    title: str
    explanation: str
    tables: Callable[[Summary], Sequence[Table]]
    figures: Callable[[Summary], Sequence[Figure]] = lambda _: ()
    notes: Callable[[Summary], Sequence[str]] = lambda _: ()
    key: str = ""
    """The section counts as not run if the summary has nothing under this key; without a key it is always there."""
    missing: str = ""
    """Words for the thing that the summary lacks when the section was not run; by default the key."""
    present: Callable[[Summary], bool] | None = None
    """Whether the section was run; by default the key's presence decides."""
    split: str = "test"
    examples: Literal["rows", "tasks", "not recorded"] = "not recorded"
    """Where the number of examples of the split stands: in the rows under the key, or in the summary's tasks."""
    seeds: Literal["rows", "run", "not recorded", "nothing drawn"] = "not recorded"
    """Where the number of seeds stands: in the rows under the key or, for means over the run, in its other rows."""
    says_bank_size: bool = False
    """Whether the explanation ends in the size of the banks, the summary's `fraction`."""


def build_sections(summary: Summary) -> list[Section]:
    """Every section, in the page's order, of a summary that `read_summary` has checked."""
    return [_build(specification, summary) for specification in SECTIONS]


def _build(spec: Specification, summary: Summary) -> Section:
    present = spec.present(summary) if spec.present else not spec.key or bool(summary.get(spec.key))
    if not present:
        lacking = spec.missing or spec.key
        return Section(spec.name, spec.title, spec.explanation, not_run=f"Not run: summary.json has no {lacking}.")
    size = f"Banks of {percent(summary['fraction'])} of all FFN neurons." if "fraction" in summary else ""
    return Section(
        spec.name,
        spec.title,
        f"{spec.explanation} {size}" if spec.says_bank_size else spec.explanation,
        split=spec.split,
        examples=_examples(spec, summary),
        seeds=_seeds(spec, summary),
        figures=spec.figures(summary),
        tables=spec.tables(summary),
        notes=spec.notes(summary),
    )


def _examples(spec: Specification, summary: Summary) -> dict[str, int]:
    """Number of examples of each task that the section rests on."""
    if spec.examples == "rows":
        return {row["task"]: row["n"] for row in rows_of(summary, spec.key)}
    if spec.examples == "tasks":
        return {task: facts["n"][spec.split] for task, facts in summary["tasks"].items() if spec.split in facts["n"]}
    return {}


def _seeds(spec: Specification, summary: Summary) -> list[int] | None:
    """Numbers of seeds that occur; none if none is recorded, None where nothing is drawn."""
    if spec.seeds == "nothing drawn":
        return None
    if spec.seeds == "rows":
        return numbers_of_seeds(rows_of(summary, spec.key))
    if spec.seeds == "run":
        return numbers_of_seeds([*rows_of(summary, "heads"), *rows_of(summary, "masking")])
    return []


def _masking_notes(summary: Summary) -> list[str]:
    return meanings(row["method"] for row in rows_of(summary, "masking"))


def _finding_notes(summary: Summary) -> list[str]:
    beside = summary["finding"]["bystanders"]
    return [
        *(f"Bystanders of {task}: {', '.join(others) if others else 'none'}." for task, others in beside.items()),
        *meanings(row["method"] for row in rows_of(summary, "finding")),
    ]


def _group_notes(summary: Summary) -> list[str]:
    steered = any(row.get("gains") for row in rows_of(summary, "groups"))
    return ["Orange is above zero, blue below.", *([] if steered else ["Steering with the groups was not run."])]


def _settings_notes(summary: Summary) -> list[str]:
    notes = [] if summary.get("settings") else ["The run recorded no settings."]
    ignored = unknown_keys(summary)
    return [*notes, f"In summary.json, but not shown here: {', '.join(ignored)}."] if ignored else notes


def _failures_recorded(summary: Summary) -> bool:
    return any("failures" in facts for facts in summary["tasks"].values())


def _failure_notes(summary: Summary) -> list[str]:
    notes = [] if tables.failures(summary) else ["No example failed."]
    missing = [task for task, facts in summary["tasks"].items() if "failures" not in facts]
    return [*notes, f"Not recorded for {', '.join(missing)}."] if missing else notes


SECTIONS = (
    Specification(
        "tasks",
        "Tasks",
        "What the untouched model scores on each task; every drop and gain below is measured from here.",
        examples="tasks",
        seeds="nothing drawn",
        tables=tables.task_tables,
    ),
    Specification(
        "heads",
        "Heads found",
        "What replacing one attention head by the mean of its layer's others costs the task: orange costs, blue helps. "
        "Ringed heads were chosen to guide the search for neurons.",
        key="heads",
        split="attribution",
        examples="rows",
        seeds="rows",
        figures=figures.head_maps,
        tables=tables.head_tables,
        notes=lambda _: ("Each map has its own scale, below it. Colors grow with the square root of the score.",),
    ),
    Specification(
        "neurons",
        "Neurons per layer",
        "Where in the model each method puts its bank of neurons: a strip per method, one cell per layer.",
        key="neurons_per_layer",
        says_bank_size=True,
        split="attribution",
        examples="tasks",
        seeds="run",
        figures=figures.neuron_strips,
        tables=tables.neuron_tables,
    ),
    Specification(
        "overlap",
        "Overlap of the tasks' banks",
        "How much two tasks' banks share: neurons in both, of those in either (Jaccard). 1 is the same bank.",
        key="overlap",
        says_bank_size=True,
        split="attribution",
        examples="tasks",
        seeds="run",
        tables=tables.overlap_tables,
    ),
    Specification(
        "masking",
        "Masking a bank",
        "What the task loses when its bank is set to zero (own drop), and how much more that is than what the other "
        "tasks lose on average (selectivity). A method that finds the task's own neurons is high in both.",
        key="masking",
        examples="rows",
        seeds="rows",
        figures=figures.masking_bars,
        tables=tables.masking_tables,
        notes=_masking_notes,
    ),
    Specification(
        "budgets",
        "Bank size",
        "The same two measures as the bank grows. Where curves flatten, more neurons add nothing.",
        key="masking",
        missing="masking with banks of several sizes",
        present=lambda summary: len(bank_sizes(summary)) > 1,
        examples="rows",
        seeds="rows",
        figures=figures.bank_size_curves,
        tables=tables.bank_size_tables,
        notes=lambda _: ("Bank sizes are shares of all FFN neurons, on a logarithmic axis.",),
    ),
    Specification(
        "finding",
        "Finding compared",
        "What masking the banks costs their own task, the other tasks, and bystanders: measured tasks that took no "
        "part in the contrast. Means and their intervals are over tasks, draws of data and test examples together.",
        key="finding",
        examples="rows",
        seeds="rows",
        tables=tables.finding_tables,
        notes=_finding_notes,
    ),
    Specification(
        "cross",
        "Across tasks",
        "The drop of every task (column) when one task's bank is set to zero (row). Of selective banks only the "
        "diagonal is orange.",
        key="cross",
        examples="tasks",
        seeds="rows",
        tables=tables.cross_tables,
    ),
    Specification(
        "groups",
        "Groups of neurons",
        "Neurons that are in exactly one task's bank, in exactly two, exactly three, or in all of them: what masking "
        "each group costs every task, and what steering with it gains.",
        key="groups",
        says_bank_size=True,
        examples="tasks",
        seeds="rows",
        tables=tables.group_tables,
        notes=_group_notes,
    ),
    Specification(
        "steering",
        "Steering",
        "Each task with its bank's activations multiplied by learned factors, and what that is compared with, as far "
        "as it was run: the model asked in words, one factor, factors on random neurons or on another method's, "
        "adapters. Content is what answers say apart from their form; its gain is over the better of base and asked.",
        key="steering",
        says_bank_size=True,
        examples="rows",
        seeds="rows",
        figures=figures.steering_bars,
        tables=tables.steering_tables,
    ),
    Specification(
        "selections",
        "Selections",
        "Factors for the banks of several methods, each chosen on dev from the same learning rates, epochs and "
        "strengths, beside what needs no bank: one factor, sparsity learned with the factors, and adapters of PEFT on "
        "the same FFNs. The gain on other tasks is what a wrong route costs.",
        key="selections",
        says_bank_size=True,
        examples="rows",
        seeds="rows",
        figures=figures.selection_bars,
        tables=tables.selection_tables,
        notes=lambda _: ("Intervals of means resample tasks, seeds and test examples.",),
    ),
    Specification(
        "strength",
        "Strength",
        "The learned factors weakened, turned round or exaggerated: 0 is the untouched model, 1 the profile as "
        "learned.",
        key="strength",
        examples="rows",
        figures=figures.strength_curves,
        tables=tables.strength_tables,
    ),
    Specification(
        "stability",
        "Stability",
        "How alike the banks are that different seeds of data lead to: the mean overlap (Jaccard) of two of them. A "
        "method that finds something real finds it again.",
        key="stability",
        says_bank_size=True,
        split="attribution",
        examples="tasks",
        seeds="run",
        tables=tables.stability_tables,
    ),
    Specification(
        "settings",
        "Settings",
        "Everything the numbers depend on, as the run recorded it, and what it took.",
        tables=tables.settings_tables,
        notes=_settings_notes,
    ),
    Specification(
        "failures",
        "Failures",
        "Examples that could not be used, each with its reason; they are in no number above.",
        missing="failures",
        present=_failures_recorded,
        tables=tables.failure_tables,
        notes=_failure_notes,
    ),
)
"""Every section, in the page's order."""
