"""Small problems for tests: a tiny random model, its processor, and examples of a task on random images."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import tiny_models
import tiny_processors
from hones_offline.examples import Example, MemoryImage
from hones_offline.tasks import JsonlTask, Task, get_task
from PIL import Image

SMALL_DEMO = ("--discovery", "24", "--dev", "8", "--test", "10")
"""Arguments of `hones demo` that make it a matter of a minute."""

CANDIDATES = ("a cat on the mat", "a big dog", "small town", "red square left of a blue circle")


@dataclass
class Problem:
    model: Any
    processor: Any
    task: Task
    examples: list[Example]


def problem(architecture: str, task_name: str, count: int = 5) -> Problem:
    """Prompts and images differ in length and size, so that batches need padding; those of "shots" begin alike."""
    model = getattr(tiny_models, architecture)()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    if architecture == "llama":
        processor = tiny_processors.text_tokenizer(model.config)
    else:
        processor = getattr(tiny_processors, f"{architecture}_processor")(model.config)
    text = task_name in ("text", "shots")
    task = JsonlTask("text", "bleu4", max_new_tokens=6) if text else get_task(task_name)
    preamble = "big cat small dog town what is " * 3 if task_name == "shots" else ""
    rng = np.random.default_rng(0)
    examples = []
    for i in range(count):
        image = None
        if architecture != "llama":
            pixels = rng.integers(0, 255, (16 + 8 * i, 24, 3), dtype=np.uint8)
            image = MemoryImage(Image.fromarray(pixels), f"random-{i}")
        question = preamble + "what is " + " ".join(("cat", "dog", "big", "small", "town")[: i % 5 + 1])
        if task_name == "retrieval":
            examples.append(Example(str(i), "", ("Yes",), image, CANDIDATES[: 4 - i % 2]))
        else:
            examples.append(Example(str(i), question, ("red cat sits", "a blue dog on mat"), image))
    return Problem(model, processor, task, examples)
