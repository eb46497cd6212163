"""Modules under the names they had when `hones_offline` was flat: imports of these go on working.

`from hones_offline.scenes import scenes` gives what `from hones_offline.data.scenes import scenes` does. `fit` and
`evaluate` are functions of the package; only `from hones_offline.fit import …` means the module.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED: dict[str, str | tuple[str, ...]] = {
    "agreement": "running.agreement",
    "banks": "data.neurons",
    "baselines": "attribution.baselines",
    "caching": "running.cache",
    "charts": "report.charts",
    "datasets": "data.datasets",
    "decoding": ("running.decoder", "running.batching"),
    "distributed": "running.distributed",
    "embedded": "running.embedded",
    "evaluate": "running.evaluation",
    "examples": "data.examples",
    "finding": ("comparison.settings", "comparison.finder"),
    "fit": ("learning.factors", "learning.methods"),
    "heads": "attribution.heads",
    "interventions": ("attribution.ablation", "attribution.measurements", "attribution.generated"),
    "metrics": "data.metrics",
    "models": "running.models",
    "negatives": "data.negatives",
    "neurons": ("attribution.write_in", "attribution.heads"),
    "pipeline": "attribution.pipeline",
    "prompts": "running.prompts",
    "racing": "attribution.racing",
    "recording": ("running.readings", "running.interventions", "running.resumption", "running.hooks"),
    "records": "data.records",
    "runs": "running.run_folder",
    "scenes": "data.scenes",
    "sections": "report.sections",
    "study": ("comparison.steering", "comparison.splits"),
    "summary": "report.summary",
    "tasks": "data.tasks",
}
"""The old name of each module below `hones_offline`, and the new one, or several where it was divided."""


class _Alias(ModuleType):
    """A module that looks its names up in those that took its place, imported when one is first asked for."""

    def __init__(self, old: str, new: tuple[str, ...]) -> None:
        super().__init__(f"hones_offline.{old}", f"Moved to {', '.join(f'hones_offline.{name}' for name in new)}.")
        self.__spec__ = ModuleSpec(self.__name__, None)
        self._new = new

    def __getattr__(self, name: str) -> object:
        if not name.startswith("__"):  # these are asked for by the import system and by inspection
            for module in self._new:
                if hasattr(found := importlib.import_module(f"hones_offline.{module}"), name):
                    return getattr(found, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make the old names importable, and attributes of the package but where a function has the name."""
    package = sys.modules["hones_offline"]
    for old, new in MOVED.items():
        alias = sys.modules[f"hones_offline.{old}"] = _Alias(old, new if isinstance(new, tuple) else (new,))
        if not hasattr(package, old):
            setattr(package, old, alias)
