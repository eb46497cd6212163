"""Measure the embedded model on the test split and print the table of its model card.

    python -m examples.tiny_vlm.evaluate_card examples/tiny_vlm/checkpoint --count 400

Run it from the repository root. Each task is measured under greedy generation, once with each scene's own
image and once with another scene's (the shuffled-image control), beside what can be had without looking.
`--write` puts the table into the checkpoint's README.md.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hones_offline.data.metrics import METRICS, Aggregate, FloatArray, bootstrap_interval, mean_of_rows, ndcg_at_k
from hones_offline.data.scenes import TASKS, Scene, scenes
from PIL import Image

METRIC_OF = {"vqa": "vqa", "ocr": "anls", "caption": "bleu4"}
TITLES = {"vqa": "VQA accuracy", "ocr": "ANLS", "caption": "BLEU-4", "retrieval": "NDCG@5"}
NEGATIVES = 9
MARKS = ("<!-- metrics begin -->", "<!-- metrics end -->")


def measure(model: Any, processor: Any, examples: Sequence[Scene]) -> dict[str, float]:
    """The four tasks' metrics, each scene with its own image."""
    rows = score(model, processor, examples, [scene.image() for scene in examples])
    return {task: round(aggregate_of(task)(rows[task].sum(0), len(examples)), 4) for task in TASKS}


def score(
    model: Any, processor: Any, examples: Sequence[Scene], images: Sequence[Image.Image]
) -> dict[str, FloatArray]:
    """Per task the rows [n, k] whose sum `aggregate_of(task)` turns into the metric."""
    rows = {}
    for task, metric in METRIC_OF.items():
        answers = generate(model, processor, images, [scene.prompt(task) for scene in examples])
        references = [targets(scene, task) for scene in examples]
        pairs = zip(answers, references, strict=True)
        rows[task] = np.stack([METRICS[metric].statistics(answer, target) for answer, target in pairs])
    ranks = [ndcg_at_k(m, 0) for m in margins(model, processor, examples, images)]
    return rows | {"retrieval": np.array(ranks)[:, None]}


def aggregate_of(task: str) -> Aggregate:
    """The metric as a function of summed rows."""
    return METRICS[METRIC_OF[task]].aggregate if task in METRIC_OF else mean_of_rows


def targets(scene: Scene, task: str) -> tuple[str, ...]:
    """Every right answer of a generating task."""
    return {"vqa": (scene.answer,), "ocr": (scene.text,), "caption": scene.captions}[task]


def generate(model: Any, processor: Any, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
    """Greedy answers, one per image and prompt."""
    answers: list[str] = []
    for start in range(0, len(prompts), 50):
        batch = encode(processor, images[start : start + 50], prompts[start : start + 50])
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=64)
        answers += processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


@torch.no_grad()
def margins(model: Any, processor: Any, examples: Sequence[Scene], images: Sequence[Image.Image]) -> list[FloatArray]:
    """Per scene the Yes-No logit margins [1 + NEGATIVES] of its candidates, the true one first."""
    yes, no = (processor.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No"))
    found = []
    for start in range(0, len(examples), 10):
        part = examples[start : start + 10]
        prompts = [s.prompt("retrieval", c) for s in part for c in s.candidates(NEGATIVES)]
        repeated = [image for image in images[start : start + 10] for _ in range(1 + NEGATIVES)]
        logits = model(**encode(processor, repeated, prompts), logits_to_keep=1).logits[:, -1]
        found += list((logits[:, yes] - logits[:, no]).double().numpy().reshape(len(part), -1))
    return found


def encode(processor: Any, images: Sequence[Image.Image], prompts: Sequence[str]) -> Any:
    """Images and prompts through the chat template, as tensors padded on the left."""
    messages = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": p}]}] for p in prompts]
    texts = [processor.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
    return processor(images=list(images), text=texts, padding=True, return_tensors="pt")


def blind(examples: Sequence[Scene], train: Sequence[Scene]) -> dict[str, float]:
    """The value of each metric without looking at the image.

    vqa: the training split's most frequent answer to the very same question. ocr: its most frequent text.
    caption: another test scene's true caption. retrieval: candidates in random order.
    """
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for scene in train:
        answers[scene.question][scene.answer] += 1
    overall = sum(answers.values(), Counter[str]()).most_common(1)
    text = Counter(scene.text for scene in train).most_common(1)[0][0]
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


def table(model: Any, processor: Any, examples: Sequence[Scene], train: Sequence[Scene]) -> str:
    """The model card's table in Markdown."""
    images = [scene.image() for scene in examples]
    own = score(model, processor, examples, images)
    shuffled = score(model, processor, examples, rotate(images))
    guesses = blind(examples, train)
    lines = [
        "| task | metric | n | own image | 95% interval | another's image | 95% interval | without looking |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        cells = [
            task,
            TITLES[task],
            str(len(examples)),
            *_cell(own[task], task),
            *_cell(shuffled[task], task),
        ]
        lines.append(f"| {' | '.join(cells)} | {guesses[task]:.3f} |")
    return "\n".join(lines)


def _cell(rows: FloatArray, task: str) -> tuple[str, str]:
    aggregate = aggregate_of(task)
    low, high = bootstrap_interval(rows, aggregate, seed=0)
    return f"{aggregate(rows.sum(0), len(rows)):.3f}", f"{low:.3f} – {high:.3f}"


def main() -> None:
    """Print the table; with --write, put it into the model card as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--write", action="store_true", help="put the table into the checkpoint's README.md")
    args = parser.parse_args()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = getattr(torch, args.dtype)
    model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype=dtype)
    load_processor: Any = AutoProcessor.from_pretrained  # has no annotations
    processor = load_processor(args.checkpoint)
    result = table(model, processor, scenes(args.split, args.count), scenes("train", 32000))
    print(result)
    if args.write:
        card = args.checkpoint / "README.md"
        before, rest = card.read_text("utf-8").split(MARKS[0])
        _, after = rest.split(MARKS[1])
        card.write_text(f"{before}{MARKS[0]}\n{result}\n{MARKS[1]}{after}", "utf-8")


if __name__ == "__main__":
    main()
