"""Attribution methods compared on one model: same tasks, same examples, same budget, over seeds of the data.

Each method makes a bank from every seed's draw of discovery examples (`finder.py`); the bank is masked while every
task's test split is measured. A method is judged by the drop on its own task, and by its selectivity: own drop less the
mean drop of the other tasks (docs/methods.md). `compare` runs it all and writes summary.json; every masked evaluation,
head statistic, importance and learned profile is a step of a run folder, so that a killed comparison goes on where it
stopped, and more seeds, methods or sizes only cost what is new.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from hones_offline.comparison.estimates import estimate
from hones_offline.comparison.finder import Finder
from hones_offline.comparison.finding import Cell, Finding, Masked, MeasuredTask, bank_row, bystanders
from hones_offline.comparison.settings import CompareSettings, parse
from hones_offline.comparison.splits import Splits
from hones_offline.comparison.steering import Steering
from hones_offline.data.metrics import CrossedBootstrap, FloatArray
from hones_offline.data.neurons import Bank, NeuronIndex, exact_groups, jaccard
from hones_offline.running.evaluation import Scores
from hones_offline.running.progress import with_progress
from hones_offline.running.run_folder import json_bytes
from hones_steer import __version__
from hones_steer.errors import DataError
from hones_steer.files import write_atomically
from hones_steer.profile import ModelIdentity

KINDS = {1: "one", 2: "pair", 3: "triple"}


def compare(
    tasks: Mapping[str, Splits],
    settings: CompareSettings,
    out: str | Path,
    *,
    title: str,
    report: Callable[[str], object] = lambda _: None,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare the methods and write what was found into `out`/summary.json, after each stage again; the summary.

    Args:
        tasks: the splits of at least two tasks by name, all encoded for one model.
        settings: what is compared.
        out: folder for summary.json, the page's and the tables' source.
        title: the page's.
        report: told each stage as it begins.
        progress: show progress bars on a terminal.

    Raises:
        DataError: fewer than two tasks, too few discovery examples for the seeds, or a task without a head or neuron
            that matters.
    """
    comparison = Comparison(tasks, settings, progress=progress)
    summary: dict[str, Any] = {"seconds": {}, **header(title)}
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "base": comparison.overview,
        "attribution": comparison.attributions,
        "masking": comparison.masking,
        "finding": comparison.finding,
        "groups": comparison.groups,
        "steering": comparison.steering.main_bank,
        "strength": comparison.steering.strength,
        "selections": comparison.steering.selections,
    }
    for stage, section in sections.items():
        if stage not in ("base", "attribution", *settings.stages):
            continue
        report(stage)
        begun = time.monotonic()
        summary |= section()
        summary["seconds"][stage] = round(time.monotonic() - begun, 1)
        write_atomically(Path(out) / "summary.json", json_bytes(summary))
    return summary


def header(title: str) -> dict[str, Any]:
    """The beginning of every summary."""
    return {"title": title, "created": datetime.now(UTC).isoformat(timespec="seconds"), "hones_steer": __version__}


class Comparison:
    """The sections of a summary: how the banks of every task, method, size and seed change every task's metric.

    Raises:
        DataError: fewer than two tasks, or so few discovery examples that all seeds would draw the same ones.
    """

    def __init__(self, tasks: Mapping[str, Splits], settings: CompareSettings, *, progress: bool = False) -> None:
        for name in ("measured", "contrast_tasks"):
            if unknown := ", ".join(sorted(set(getattr(settings, name) or ()) - set(tasks))):
                raise DataError(f"{name} names {unknown}, which is not among the tasks {', '.join(tasks)}")
        self.tasks, self.settings, self.progress = tasks, settings, progress
        self.measured = {task: tasks[task] for task in tasks if task in (settings.measured or tasks)}
        if len(self.measured) < 2:
            raise DataError("selectivity compares tasks; give at least two")
        self.finder = Finder(tasks, settings, progress=progress)
        self.bootstrap = CrossedBootstrap()
        self.seeds = range(settings.seeds)
        layout = next(iter(tasks.values())).discovery.decoder.layout
        self.num_layers, self.index = len(layout.layers), NeuronIndex.of(layout)
        self.fill = cache(self._position_means)
        self.base = cache(lambda task: self.values(task, tasks[task].measure("test")))
        self.steering = Steering(self.measured, settings, self.finder, self.bootstrap, progress=progress)

    def values(self, task: str, scores: Scores) -> FloatArray:
        """A measurement on a task's test split as a quantity of the bootstrap."""
        return self.bootstrap.values(task, scores.statistics, scores.task.aggregate)

    def _position_means(self) -> FloatArray:
        """Mean z over the positions of all tasks' discovery examples, each task weighing the same, [N]."""
        every = with_progress(self.tasks.values(), "mean activations", show=self.progress)
        means: FloatArray = np.mean([splits.position_means() for splits in every], axis=0)
        return means

    def _masked(self, splits: Splits, bank: Bank, ablation: str) -> Scores:
        return splits.measure("test", mask=bank, fill=self.fill() if ablation == "mean" else None)

    def drop(self, task: str, bank: Bank, ablation: str = "zero") -> FloatArray:
        """The loss of a task's metric on test when a bank is masked, [1 + resamples]."""
        return self.base(task) - self.values(task, self._masked(self.tasks[task], bank, ablation))

    def mask_all(self, banks: Iterable[Bank], ablation: str = "zero") -> None:
        """Measure every task with each of the banks masked, so that the tables find it done."""
        different = list({bank.digest: bank for bank in banks}.values())
        work = list(product(self.measured.values(), different))
        for splits, bank in with_progress(work, f"masking ({ablation})", show=self.progress):
            self._masked(splits, bank, ablation)

    # ------------------------------------------------------------------------------------- sections of the summary

    def overview(self) -> dict[str, Any]:
        """Sections "model", "tasks" and "settings"."""
        splits = next(iter(self.tasks.values()))
        model = splits.discovery.decoder.model
        identity = ModelIdentity.from_model(model)
        width = identity.intermediate_size
        return {
            "model": {
                "name": identity.name,
                "model_type": identity.model_type,
                "num_layers": identity.num_layers,
                **({"intermediate_size": width} if width is not None else {"num_neurons": self.index.size}),
                "num_heads": max(layer.num_heads or 0 for layer in splits.discovery.decoder.layout.layers),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            },
            "tasks": {task: self._task(task) for task in self.tasks},
            "settings": {**_flat(self.settings), "batch_size": splits.batch_size},
            "fraction": self.settings.fraction,
        }

    def _task(self, task: str) -> dict[str, Any]:
        splits = self.tasks[task]
        sizes = {name: len(part) for name, part in splits.parts.items()}
        return {
            "metric": splits.task.metric,
            "n": {**sizes, "attribution": len(self.finder.drawn(task, 0))},
            **estimate("base", self.base(task)),
            "failures": {name: part.failures for name, part in splits.parts.items() if part.failures},
        }

    def attributions(self) -> dict[str, Any]:
        """Sections "heads", "neurons_per_layer", "overlap" and "stability": the heads and neurons of each method."""
        result: dict[str, Any] = {
            "neurons_per_layer": {
                task: {name: self._per_layer(task, name) for name in self.settings.methods} for task in self.measured
            },
            "overlap": {name: self._overlap(name) for name in self.settings.methods},
        }
        by_heads = [name for name in (self.settings.main, *self.settings.methods) if parse(name).options.entry.guided]
        if by_heads:
            result["heads"] = {task: self._heads(task, by_heads[0]) for task in self.measured}
        if len(self.seeds) > 1:
            result["stability"] = {
                task: {name: self._stability(task, name) for name in self.settings.methods} for task in self.measured
            }
        return result

    def _banks(self, task: str, name: str) -> list[Bank]:
        """One for each seed, of the main size."""
        return [self.finder.bank(task, name, self.settings.fraction, seed) for seed in self.seeds]

    def _heads(self, task: str, name: str) -> dict[str, Any]:
        attributions = [self.finder.attribution(task, name, seed) for seed in self.seeds]
        return {
            "metric": parse(name).options.head_metric,
            # No head is shown as one that costs nothing.
            "scores": np.nan_to_num(np.mean([found.head_scores for found in attributions], axis=0)).tolist(),
            "chosen": attributions[0].heads,
            "seeds": len(self.seeds),
            "n": attributions[0].n,
        }

    def _per_layer(self, task: str, name: str) -> list[float]:
        banks = self._banks(task, name)
        return [float(np.mean([bank.in_layer(layer) for bank in banks])) for layer in range(self.num_layers)]

    def _overlap(self, name: str) -> dict[str, Any]:
        banks = {task: self._banks(task, name) for task in self.measured}

        def mean(row: str, column: str) -> float:
            return float(np.mean([jaccard(*pair) for pair in zip(banks[row], banks[column], strict=True)]))

        return {"tasks": list(banks), "jaccard": [[mean(row, column) for column in banks] for row in banks]}

    def _stability(self, task: str, name: str) -> float:
        return float(np.mean([jaccard(*pair) for pair in combinations(self._banks(task, name), 2)]))

    def _sizes(self) -> list[tuple[str, float]]:
        """The methods and sizes whose banks are masked."""
        settings = self.settings
        swept = settings.methods if settings.sweep is None else settings.sweep
        return [
            (method, fraction)
            for method in settings.methods
            for fraction in settings.fractions
            if fraction == settings.fraction or method in swept
        ]

    def masking(self) -> dict[str, Any]:
        """Sections "masking" and "cross"."""
        cells = [(task, *size) for task in self.measured for size in self._sizes()]
        self.mask_all(self.finder.bank(*cell, seed) for cell in cells for seed in self.seeds)
        tasks, rows = self._measured_tasks(), []
        for task, method, fraction in cells:
            masked = self._all_drops(task, Cell(method, fraction, "zero"))
            row = bank_row(self.bootstrap, tasks, task, masked)
            rows.append({"method": method, "fraction": fraction, **row})
        return {"masking": rows, "cross": self._cross()}

    def finding(self) -> dict[str, Any]:
        """Section "finding": what each method's banks cost their own task, the others and the bystanders."""
        settings, sizes = self.settings, self._sizes()
        banks = [self.finder.bank(task, *size, seed) for task in self.measured for size in sizes for seed in self.seeds]
        for ablation in settings.ablations:
            self.mask_all(banks, ablation)
        cells = [Cell(*size, ablation) for ablation in settings.ablations for size in sizes]
        found = Finding(self._measured_tasks(), self._all_drops, self.bootstrap)
        return {"finding": found.section(cells, settings.own_drop_levels, settings.reference)}

    def _measured_tasks(self) -> dict[str, MeasuredTask]:
        beside = bystanders([*self.measured], self.settings.contrast_tasks)
        return {
            task: MeasuredTask(float(self.base(task)[0]), len(splits.test), beside[task])
            for task, splits in self.measured.items()
        }

    def _all_drops(self, task: str, cell: Cell) -> Masked:
        """The drops of every measured task when a task's bank of each seed is masked."""
        banks = [self.finder.bank(task, cell.method, cell.fraction, seed) for seed in self.seeds]
        drops = [[self.drop(other, bank, cell.ablation) for other in self.measured] for bank in banks]
        return Masked(float(np.mean([bank.size for bank in banks])), np.array(drops))

    def _drop_cell(self, measured: str, banks: Sequence[Bank]) -> dict[str, Any]:
        return estimate("drop", self.bootstrap.over_seeds([self.drop(measured, bank) for bank in banks]), "ci95")

    def _cross(self) -> dict[str, Any]:
        main = self.settings.main
        drops = {
            task: {measured: self._drop_cell(measured, self._banks(task, main)) for measured in self.measured}
            for task in self.measured
        }
        return {"method": main, "fraction": self.settings.fraction, "drops": drops}

    def groups(self) -> dict[str, Any]:
        """Section "groups": the main method's banks divided by how many tasks share a neuron.

        Neurons of exactly one, two, three or all tasks, masked while every task is measured; with the stage
        "steer_groups" also with factors learned on each task.
        """
        fraction, main = self.settings.fraction, self.settings.main
        groups: dict[tuple[str, ...], dict[int, Bank]] = {}  # tasks -> seed -> neurons
        for seed in range(self.settings.group_seeds):
            banks = {task: self.finder.bank(task, main, fraction, seed) for task in self.measured}
            for members, bank in exact_groups(banks).items():
                if self._kind(members):
                    groups.setdefault(members, {})[seed] = bank
        self.mask_all(bank for of_seed in groups.values() for bank in of_seed.values())
        order = sorted(
            groups, key=lambda members: (len(members), [list(self.measured).index(task) for task in members])
        )
        return {"groups": [self._group_row(members, groups[members]) for members in order]}

    def _kind(self, members: Sequence[str]) -> str | None:
        return "all" if len(members) == len(self.measured) else KINDS.get(len(members))

    def _group_row(self, members: Sequence[str], banks: Mapping[int, Bank]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "group": "+".join(members),
            "kind": self._kind(members),
            "neurons": round(np.mean([bank.size for bank in banks.values()])),
            "seeds": len(banks),
            "drops": {task: self._drop_cell(task, list(banks.values())) for task in self.measured},
        }
        if "steer_groups" in self.settings.stages:
            row["gains"] = {task: self.steering.group_gain(task, banks) for task in self.measured}
        return row


def _flat(settings: CompareSettings) -> dict[str, Any]:
    """Settings without a table inside a table: those of `fit` and `grid` under names of their own."""
    flat: dict[str, Any] = {}
    for name, value in asdict(settings).items():
        flat |= {f"{name}_{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat
