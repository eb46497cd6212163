"""Small problems for tests: a tiny random model, its processor, and examples of a task on random images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import further_models
import mixture_models
import numpy as np
import pytest
import tiny_models
import tiny_processors
import unusual_models
from hones_offline.attribution.heads import WeightedHead
from hones_offline.data.examples import Example, MemoryImage
from hones_offline.data.neurons import FfnKey
from hones_offline.data.tasks import JsonlTask, Task, get_task
from hones_offline.running.prompts import Prepared
from PIL import Image

from hones_steer.ffns import Ffn

SMALL_DEMO = ("--discovery", "24", "--dev", "8", "--test", "10")
"""Arguments of `hones demo` that make it a matter of a minute."""

CANDIDATES = ("a cat on the mat", "a big dog", "small town", "red square left of a blue circle")


_MODELS = (tiny_models, further_models, unusual_models, mixture_models)
_IMAGES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "idefics3", "smolvlm", "internvl")


def every_architecture(represented: Sequence[tuple[str, str]], *, mixtures: bool = True) -> list[Any]:
    """Cases (architecture, task), `represented` and all others that docs/attribution.md lists, these in the matrix.

    Mixtures of experts are among them unless they are not wanted.
    """
    cases = [(name, "text") for name in (*tiny_models.ALL, *further_models.FURTHER)]
    cases += [(name, "text") for name in MIXTURES if mixtures]
    cases += [(name, task) for name in _IMAGES for task in ("vqa", "retrieval")]
    old = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in PaliGemma's processor
    marks = {"paligemma": [pytest.mark.matrix, old]}
    rest = [pytest.param(c, marks=marks.get(c[0], pytest.mark.matrix)) for c in cases if c not in represented]
    return [*represented, *rest]


MIXTURES = (
    *("qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss", "glm4v_moe", "qwen3_vl_moe", "nemotron_h_moe"),
    *("qwen3_5_moe", "llama4"),
)
"""The mixtures of experts that attribution runs on."""

HEADS = ((0, 1, 0.5), (1, 3, 0.25), (2, 0, 0.125))


def some_heads(prepared: Prepared) -> list[WeightedHead]:
    """Heads to be guided by as (layer, head, weight), in layers that have some."""
    layers = [layer.index for layer in prepared.decoder.layout.layers if layer.attn_out is not None]
    return [(layers[layer % len(layers)], head, weight) for layer, head, weight in HEADS]


def some_ffns(prepared: Prepared) -> list[FfnKey]:
    """The lowest FFN and two high ones, ascending; of a mixture experts, and where there is one a shared expert."""
    layout = prepared.decoder.layout
    if not layout.experts:
        dense = [layer.index for layer in layout.with_ffn]
        return [dense[0], *dense[-2:]]
    lowest, highest = min(layout.experts), max(layout.experts)
    second = "shared" if layout.layers[highest].shared_out is not None else 0
    return [Ffn(lowest, 1), Ffn(highest, second), Ffn(highest, 1)]


@dataclass
class Problem:
    model: Any
    processor: Any
    task: Task
    examples: list[Example]


def problem(architecture: str, task_name: str, count: int = 5) -> Problem:
    """Prompts and images differ in length and size, so that batches need padding; those of "shots" begin alike.

    Those of "text" and "shots" have no image, of a vision-language model either.
    """
    models = next(module for module in _MODELS if hasattr(module, architecture))
    model = getattr(models, architecture)()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    text = task_name in ("text", "shots")
    if text:
        processor = tiny_processors.text_tokenizer(model.config)
    else:
        processor = getattr(tiny_processors, f"{architecture}_processor")(model.config)
    task = JsonlTask("text", "bleu4", max_new_tokens=6) if text else get_task(task_name)
    preamble = "big cat small dog town what is " * 3 if task_name == "shots" else ""
    rng = np.random.default_rng(0)
    examples = []
    for i in range(count):
        image = None
        if not text:
            pixels = rng.integers(0, 255, (16 + 8 * i, 24, 3), dtype=np.uint8)
            image = MemoryImage(Image.fromarray(pixels), f"random-{i}")
        question = preamble + "what is " + " ".join(("cat", "dog", "big", "small", "town")[: i % 5 + 1])
        if task_name == "retrieval":
            examples.append(Example(str(i), "", ("Yes",), image, CANDIDATES[: 4 - i % 2]))
        else:
            examples.append(Example(str(i), question, ("red cat sits", "a blue dog on mat"), image))
    return Problem(model, processor, task, examples)
