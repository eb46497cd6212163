"""Attribution, learning and evaluation of steering profiles: the HONES method (arXiv 2604.17941).

from hones_offline import attribute, fit, evaluate, get_task

task = get_task("vqa")
found = attribute(model, processor, task, discovery)       # heads → importance → bank
profile = fit(model, processor, task, discovery, found.bank)
scores = evaluate(model, processor, task, test, steering=profile)
"""

# Imported eagerly: `fit` and `evaluate` are functions here and modules below, and the functions must win.
from hones_offline.evaluate import Scores, evaluate
from hones_offline.examples import Example
from hones_offline.fit import fit
from hones_offline.pipeline import Attribution, attribute
from hones_offline.tasks import Task, get_task

__all__ = ["Attribution", "Example", "Scores", "Task", "attribute", "evaluate", "fit", "get_task"]
