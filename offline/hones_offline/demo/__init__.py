"""`hones demo`: the whole promise on the model that ships with hones-steer, in a few minutes on two CPU cores.

- `data_set`: the four tasks on generated scenes, as their data set wants them answered.
- `settings`: all that is decided before a run.
- `measured`: what each way of asking and steering gives on test, as rows of a summary.
- `adapters`: the committed rows of IA3 and LoRA, which need packages that the demo does not.
- `text`, `picture`: what a person reads.
- `command`: the run.
"""

from hones_offline.demo.command import demo
from hones_offline.demo.data_set import NEGATIVES
from hones_offline.demo.settings import COMPARED

__all__ = ["COMPARED", "NEGATIVES", "demo"]
