"""Modules under the names they had when `hones_offline` was flat: imports of these go on working.

`from hones_offline.scenes import scenes` gives what `from hones_offline.data.scenes import scenes` does. `fit` and
`evaluate` are functions of the package; only `from hones_offline.fit import …` means the module.
"""

import importlib
import sys
from types import ModuleType

MOVED = {
    "agreement": "running.agreement",
    "banks": "data.neurons",
    "baselines": "attribution.baselines",
    "caching": "running.cache",
    "charts": "report.charts",
    "datasets": "data.datasets",
    "decoding": "running.decoder",
    "distributed": "running.distributed",
    "embedded": "running.embedded",
    "evaluate": "running.evaluation",
    "examples": "data.examples",
    "finding": "comparison.finding",
    "fit": "learning.factors",
    "heads": "attribution.heads",
    "interventions": "attribution.ablation",
    "metrics": "data.metrics",
    "models": "running.models",
    "negatives": "data.negatives",
    "neurons": "attribution.write_in",
    "pipeline": "attribution.pipeline",
    "prompts": "running.prompts",
    "racing": "attribution.racing",
    "recording": "running.hooks",
    "records": "data.records",
    "runs": "running.run_folder",
    "scenes": "data.scenes",
    "sections": "report.sections",
    "study": "comparison.study",
    "summary": "report.summary",
    "tasks": "data.tasks",
    "wording": "report.wording",
}
"""The old name of each module below `hones_offline`, and the new one."""


class _Alias(ModuleType):
    """A module that looks its names up in the one that took its place, imported when one is first asked for."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(f"hones_offline.{old}", f"Moved to hones_offline.{new}.")
        self._new = f"hones_offline.{new}"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # asked for by the import system and by inspection
            raise AttributeError(name)
        return getattr(importlib.import_module(self._new), name)


def register() -> None:
    """Make the old names importable, and attributes of the package but where a function has the name."""
    package = sys.modules["hones_offline"]
    for old, new in MOVED.items():
        alias = sys.modules[f"hones_offline.{old}"] = _Alias(old, new)
        if not hasattr(package, old):
            setattr(package, old, alias)
