"""Measure the embedded model on the test split and print the tables of its model card.

    python -m examples.tiny_vlm.evaluate_card examples/tiny_vlm/checkpoint --count 400

Run it from the repository root. The first table is about the scenes' own data set, whose conventions the model does not
know: each task is measured as it is, asked for the conventions in words, and with another scene's image (the
shuffled-image control), beside what can be had without looking. The second asks for every form that the model has words
for, on clear pictures. Generation is greedy. `--write` writes the checkpoint's README.md: card.md with the tables.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hones_offline.data.content import content
from hones_offline.data.metrics import METRICS, Aggregate, FloatArray, bootstrap_interval, mean_of_rows, ndcg_at_k
from hones_offline.data.scene_language import (
    ANSWER_FORMS,
    FORMS,
    ORDERS,
    REQUESTS,
    TEXT_FORMS,
    ask,
    caption,
    transcription,
)
from hones_offline.data.scenes import IN_WORDS, KINDS, TASKS, Scene, alter, scenes
from hones_offline.demo.data_set import SEED
from PIL import Image

from hones_steer.files import write_atomically

METRIC_OF = {"vqa": "vqa", "ocr": "anls", "caption": "bleu4"}
TITLES = {"vqa": "VQA accuracy", "ocr": "ANLS", "caption": "BLEU-4", "retrieval": "NDCG@5"}
NEGATIVES = 7
CARD = Path(__file__).with_name("card.md")
MARKS = ("<!-- metrics begin -->", "<!-- metrics end -->")


@dataclass(frozen=True)
class Measured:
    """A task on n scenes: the metric's rows [n, k], and what the answers say apart from their form, [n, 1]."""

    task: str
    rows: FloatArray
    content: FloatArray

    @property
    def aggregate(self) -> Aggregate:
        """The metric as a function of summed rows."""
        return METRICS[METRIC_OF[self.task]].aggregate if self.task in METRIC_OF else mean_of_rows

    @property
    def value(self) -> float:
        """The task's metric."""
        return self.aggregate(self.rows.sum(0), len(self.rows))


def measure(
    model: Any, processor: Any, task: str, examples: Sequence[Scene], images: Sequence[Image.Image], words: str = ""
) -> Measured:
    """Measure a task on scenes with the given images; `words` follow each prompt in a line of their own."""
    after = f"\n{words}" if words else ""
    if task == "retrieval":
        ranks = np.array([[ndcg_at_k(m, 0)] for m in margins(model, processor, examples, images, after)])
        return Measured(task, ranks, ranks)
    outputs = generate(model, processor, images, [scene.prompt(task) + after for scene in examples])
    said = list(zip(outputs, examples, strict=True))
    rows = [METRICS[METRIC_OF[task]].statistics(output, targets(scene, task)) for output, scene in said]
    return Measured(task, np.stack(rows), np.array([[content(task, output, scene)] for output, scene in said]))


def targets(scene: Scene, task: str) -> tuple[str, ...]:
    """Every right answer of a generating task."""
    return {"vqa": (scene.answer,), "ocr": (scene.transcription,), "caption": scene.captions}[task]


def generate(model: Any, processor: Any, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
    """Greedy answers, one per image and prompt."""
    answers: list[str] = []
    for start in range(0, len(prompts), 50):
        batch = encode(processor, images[start : start + 50], prompts[start : start + 50])
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=72)
        answers += processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


@torch.no_grad()
def margins(
    model: Any, processor: Any, examples: Sequence[Scene], images: Sequence[Image.Image], after: str = ""
) -> list[FloatArray]:
    """Per scene the Yes-No logit margins [1 + NEGATIVES] of its candidates, the right one first."""
    yes, no = (processor.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No"))
    found = []
    for start in range(0, len(examples), 10):
        part = examples[start : start + 10]
        prompts = [s.prompt("retrieval", c) + after for s in part for c in s.candidates(NEGATIVES)]
        repeated = [image for image in images[start : start + 10] for _ in range(1 + NEGATIVES)]
        logits = model(**encode(processor, repeated, prompts), logits_to_keep=1).logits[:, -1]
        found += list((logits[:, yes] - logits[:, no]).double().numpy().reshape(len(part), -1))
    return found


def encode(processor: Any, images: Sequence[Image.Image], prompts: Sequence[str]) -> Any:
    """Images and prompts through the chat template, as tensors padded on the left."""
    messages = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": p}]}] for p in prompts]
    texts = [processor.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
    return processor(images=list(images), text=texts, padding=True, return_tensors="pt")


def blind(examples: Sequence[Scene], known: Sequence[Scene]) -> dict[str, float]:
    """The value of each metric without looking at the image, for someone who knows other scenes of the data set.

    vqa: the most frequent answer to the very same question. ocr: the most frequent text. caption: another test scene's
    reference. retrieval: candidates in random order.
    """
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for scene in known:
        answers[scene.question][scene.answer] += 1
    overall = sum(answers.values(), Counter[str]()).most_common(1)
    text = Counter(scene.transcription for scene in known).most_common(1)[0][0]
    guesses = {
        "vqa": [(answers[scene.question].most_common(1) or overall)[0][0] for scene in examples],
        "ocr": [text] * len(examples),
        "caption": [scene.captions[0] for scene in rotate(examples)],
    }
    results = {}
    for task, guessed in guesses.items():
        metric = METRICS[METRIC_OF[task]]
        rows = [metric.statistics(g, targets(s, task)) for g, s in zip(guessed, examples, strict=True)]
        results[task] = metric.aggregate(np.sum(rows, axis=0), len(examples))
    return results | {"retrieval": ndcg_at_k(np.zeros(1 + NEGATIVES), 0)}


def rotate(items: Sequence[Any]) -> list[Any]:
    """Every example gets its neighbor's item."""
    return [*items[1:], items[0]]


def data_set_table(model: Any, processor: Any, examples: Sequence[Scene], known: Sequence[Scene]) -> str:
    """The table of the data set's four tasks, in Markdown."""
    images = [scene.image() for scene in examples]
    guesses = blind(examples, known)
    lines = [
        "| task | metric | n | asked | metric | 95% interval | content | 95% interval | without looking |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        rows = {"as it is": measure(model, processor, task, examples, images)}
        for words in IN_WORDS[task]:
            rows[f"“{words}”"] = measure(model, processor, task, examples, images, words)
        rows["as it is, another's image"] = measure(model, processor, task, examples, rotate(images))
        for name, found in rows.items():
            cells = [task, TITLES[task], str(len(examples)), name, *_cells(found.rows, found.aggregate)]
            cells += [*_cells(found.content, mean_of_rows), f"{guesses[task]:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(rows: FloatArray, aggregate: Aggregate) -> tuple[str, str]:
    low, high = bootstrap_interval(rows, aggregate, seed=0)
    return f"{aggregate(rows.sum(0), len(rows)):.3f}", f"{low:.3f} – {high:.3f}"


Targets = Callable[[Scene], tuple[str, ...]]


def forms_table(model: Any, processor: Any, examples: Sequence[Scene]) -> str:
    """The table of what the model does when a form is asked for in words, in Markdown."""
    lines = ["| task | form | asked | metric | n | value | 95% interval |", "|---|---|---|---|---|---|---|"]
    for task, form, words, rows in in_every_form(model, processor, examples):
        metric = METRICS[METRIC_OF[task]] if task in METRIC_OF else METRICS["exact_match"]
        cells = [task, form, f"“{words}”", metric.title, str(len(rows)), *_cells(rows, metric.aggregate)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_every_form(model: Any, processor: Any, examples: Sequence[Scene]) -> list[tuple[str, str, str, FloatArray]]:
    """Ask for each form by its first wording, on clear pictures: (task, form, words, metric's rows [n, k]).

    Left and right are the picture's, texts may be read from either side, and captions may have any order: those are no
    matter of form.
    """
    rng = random.Random(0)
    clear = [replace(s, look="clear", asked=ask(s.cells, s.text, rng, KINDS)) for s in examples]
    images = [scene.image() for scene in clear]
    right: dict[Any, tuple[str, Targets]] = {}
    right |= {form: ("vqa", partial(_answer, form)) for form in ANSWER_FORMS}
    right |= {form: ("ocr", partial(_text, form)) for form in TEXT_FORMS}
    right |= {form: ("caption", partial(_orders, form)) for form in FORMS}
    found = []
    for form, (task, targets_of) in right.items():
        words = REQUESTS[form][0]
        outputs = generate(model, processor, images, [f"{scene.prompt(task)}\n{words}" for scene in clear])
        statistics = METRICS[METRIC_OF[task]].statistics
        rows = [statistics(output, targets_of(scene)) for output, scene in zip(outputs, clear, strict=True)]
        found.append((task, form, words, np.stack(rows)))
    for true, false in JUDGEMENTS:
        shown = [(scene, rng.random() < 0.5) for scene in clear]
        candidates = [caption(s.cells if holds else alter(s.cells, rng)) for s, holds in shown]
        words = f"{true} or {false}?"
        outputs = generate(model, processor, images, [f"{candidate}\n{words}" for candidate in candidates])
        exact = METRICS["exact_match"].statistics
        rows = [exact(o, [true if holds else false]) for o, (_, holds) in zip(outputs, shown, strict=True)]
        found.append(("retrieval", true, words, np.stack(rows)))
    return found


JUDGEMENTS = (("True", "False"), ("Right", "Wrong"))


def _answer(form: Any, scene: Scene) -> tuple[str, ...]:
    return (scene.asked.answered(form),)


def _text(form: Any, scene: Scene) -> tuple[str, ...]:
    return tuple(transcription(scene.text, form, backward=backward) for backward in (False, True))


def _orders(form: Any, scene: Scene) -> tuple[str, ...]:
    return tuple(caption(scene.cells, form, order, counted=counted) for order in ORDERS for counted in (False, True))


def main() -> None:
    """Print the tables; with --write, write the model card with them as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--write", action="store_true", help="write the checkpoint's README.md")
    args = parser.parse_args()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = getattr(torch, args.dtype)
    model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype=dtype)
    load_processor: Any = AutoProcessor.from_pretrained  # has no annotations
    processor = load_processor(args.checkpoint)
    examples = scenes(args.split, args.count, SEED)
    tables = [
        data_set_table(model, processor, examples, scenes("discovery", 2000, SEED)),
        forms_table(model, processor, examples),
    ]
    result = "\n\n".join(tables)
    print(result)
    if args.write:
        before, rest = CARD.read_text("utf-8").split(MARKS[0])
        _, after = rest.split(MARKS[1])
        card = f"{before}{MARKS[0]}\n{result}\n{MARKS[1]}{after}"
        write_atomically(args.checkpoint / "README.md", card.encode())


if __name__ == "__main__":
    main()
