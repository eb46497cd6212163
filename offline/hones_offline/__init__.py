"""Attribution, learning and evaluation of steering profiles: by the HONES method (arXiv 2604.17941), and beyond it.

from hones_offline import attribute, evaluate, fit, get_task, learn

task = get_task("vqa")
found = attribute(model, processor, task, discovery)       # importance → bank
profile = fit(model, processor, task, discovery, found.bank)
scores = evaluate(model, processor, task, test, steering=profile)

learned = learn(model, processor, task, examples, run_dir="runs/vqa")  # all of it, with the choices made on dev
"""

from hones_offline.attribution.pipeline import Attribution, attribute
from hones_offline.data.examples import Example
from hones_offline.data.tasks import Task, get_task
from hones_offline.learning.factors import fit
from hones_offline.moved import register
from hones_offline.running.evaluation import Scores, evaluate
from hones_offline.search.pipeline import Learned, learn

register()

__all__ = ["Attribution", "Example", "Learned", "Scores", "Task", "attribute", "evaluate", "fit", "get_task", "learn"]
