"""The bank of every task, method, size and seed: examples are drawn, and `find_bank` is called for each draw.

Some take what it gave for others: a contrast, and "ape", compare the importances of several tasks, and "random" has the
main method's sizes.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np

from hones_offline.attribution.contrast import contrasted
from hones_offline.attribution.heads import HeadMetric, HeadScores, head_scores, head_statistics
from hones_offline.attribution.methods import METHODS
from hones_offline.attribution.pipeline import Attribution, find_bank
from hones_offline.comparison.settings import CompareSettings, parse, uncontrasted
from hones_offline.comparison.splits import Splits
from hones_offline.data.metrics import FloatArray
from hones_offline.data.neurons import Bank, Importance, NeuronIndex
from hones_offline.data.records import naming
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared
from hones_offline.running.run_folder import RunFolder, run_settings
from hones_steer.errors import DataError


class Finder:
    """Banks of every task, method, size and seed.

    A seed draws `attribution_examples` of a task's discovery examples, and every method gets the same draw; a task that
    is only compared with gives all it has, if that is fewer. Heads are run once on every example that may be drawn (the
    pool); importances are steps of the task's run folder.

    Raises:
        DataError: a task that gets banks has so few discovery examples that all seeds would draw the same ones, a
            method compares tasks and has none to compare with, or an example needs more memory than there is.
        LayoutError: a method cannot be run on the model.
    """

    def __init__(self, tasks: Mapping[str, Splits], settings: CompareSettings, *, progress: bool = False) -> None:
        self.tasks, self.settings, self.progress = tasks, settings, progress
        self.pools = {task: splits.discovery.first(settings.pool) for task, splits in tasks.items()}
        with_banks = list(tasks) if settings.measured is None else settings.measured
        for task in with_banks:
            size = len(self.pools[task])
            if settings.seeds > 1 and size <= settings.attribution_examples:
                raise DataError(
                    f"task {task!r} has {size} examples to draw from, so that each seed would draw the same; set "
                    "attribution_examples lower or give more discovery examples"
                )
        names = dict.fromkeys((*settings.methods, *settings.selections))
        for name in names:
            for task in with_banks:
                if parse(name).compares_tasks and not self.others(task):
                    raise DataError(
                        f"method {name!r} has no task to contrast {task!r} with; name another one in contrast_tasks"
                    )
        execution = Execution(memory_gb=settings.memory_gb)
        for check in {METHODS[parse(name).base].check for name in names}:
            for pool in self.pools.values():
                check(pool, execution)
        self.statistics = cache(self._statistics)
        self.importance = cache(self._importance)
        self.bank = cache(self._bank)
        self._attributed = cache(self._attribute)

    def drawn(self, task: str, seed: int) -> list[int]:
        """The numbers of the pool's examples that a seed draws."""
        order = np.random.default_rng(seed).permutation(len(self.pools[task]))
        numbers: list[int] = order[: self.settings.attribution_examples].tolist()
        return numbers

    def examples(self, task: str, seed: int) -> Prepared:
        """The examples that a seed draws."""
        return self.pools[task].only(self.drawn(task, seed))

    def others(self, task: str) -> list[str]:
        """The tasks that a method with a contrast compares this one with, in their order."""
        chosen = self.settings.contrast_tasks
        return [other for other in self.tasks if other != task and (chosen is None or other in chosen)]

    def _bank(self, task: str, name: str, fraction: float, seed: int) -> Bank:
        """A method's bank; a random one has as many neurons in each layer as the main method's."""
        if name == "random":
            index = NeuronIndex.of(self.tasks[task].discovery.decoder.layout)
            return self.bank(task, self.settings.main, fraction, seed).random(index, seed)
        settings, contrast, plain = self.settings, parse(name).contrast, uncontrasted(name)
        importance = self.importance(task, plain, seed)
        others = [self.importance(other, plain, seed) for other in self.others(task)] if contrast else []
        with naming(f"task {task!r}, method {name!r}, seed {seed}"):
            if contrast is not None:
                parameters = {"pool_factor": settings.pool_factor, "floor": settings.floor}
                importance = contrasted(importance, others, contrast, fraction, **parameters)
            return importance.bank(fraction)

    def attribution(self, task: str, name: str, seed: int) -> Attribution:
        """The attribution on a seed's draw, with the method's bank of the main size.

        Raises:
            DataError: the method is "random" or "ape", which take what was found by others; `bank` has their banks.
        """
        method = parse(name)
        if method.base == "random" or METHODS[method.base].contrast is not None:
            raise DataError(f"method {name!r} is not attributed on its own; its banks come from `bank`")
        attribution = self._attributed(task, uncontrasted(name), seed)
        return replace(attribution, bank=self.bank(task, name, self.settings.fraction, seed))

    def _importance(self, task: str, name: str, seed: int) -> Importance:
        """The importance of every neuron by a method other than "random", without a contrast."""
        method = METHODS[parse(name).base]
        if method.contrast is None:
            return self._attributed(task, name, seed).importance
        compared = {task, *self.others(task)}
        tables = {one: self.importance(one, method.single_task, seed) for one in self.tasks if one in compared}
        return method.contrast(tables)[task]

    def _attribute(self, task: str, name: str, seed: int) -> Attribution:
        """The attribution on a seed's draw, its bank of the main size; the importance is a kept step."""
        splits = self.tasks[task]
        options = replace(parse(name).options, top_fraction=self.settings.fraction)
        if options.entry.guided:
            options = replace(options, top_heads=self.settings.top_heads)
        execution = Execution(splits.batch_size, self.settings.memory_gb, folder=splits.run, progress=self.progress)
        with naming(f"task {task!r}, method {name!r}, seed {seed}"):
            if not options.entry.guided:
                unscored = HeadScores.none(np.nan)  # nobody asks for the utility: it need not be measured
                return find_bank(self.examples(task, seed), options, execution, scores=unscored)
            compared = self.tasks if options.needs_all_tasks else ()
            return find_bank(
                self.examples(task, seed),
                options,
                execution,
                scores=self.scores(task, options.head_metric, seed),
                all_tasks=[self.scores(other, options.head_metric, seed) for other in compared],
            )

    def scores(self, task: str, metric: HeadMetric, seed: int) -> HeadScores:
        """P(θ) and S(h) on the examples that a seed draws, from the statistics of the whole pool."""
        pool = self.pools[task]
        base, replaced = self.statistics(task, metric)
        items = self.drawn(task, seed)
        if metric == "logprob":  # items are (prompt, answer) pairs there
            firsts = np.cumsum([0, *(len(pool.task.answers(example)) for example in pool.examples)])
            items = [pair for i in items for pair in range(firsts[i], firsts[i + 1])]
        return head_scores(pool, metric, base[items], replaced[:, :, items])

    def _statistics(self, task: str, metric: HeadMetric) -> tuple[FloatArray, FloatArray]:
        """`head_statistics` of the whole pool, in a run folder of its own."""
        pool, splits = self.pools[task], self.tasks[task]
        settings = {"stage": "heads", **run_settings(pool), "head_metric": metric, "batch_size": splits.batch_size}
        settings["memory_gb"] = self.settings.memory_gb
        run = RunFolder(splits.path / f"heads-{metric}-{len(pool)}", settings)
        execution = Execution(splits.batch_size, self.settings.memory_gb, folder=run, progress=self.progress)
        return head_statistics(pool, metric, execution)
