"""Measure what the model can do, asked in words and after worked examples, and write the table into card.md.

    python -m examples.smolvlm.evaluate_card runs/smolvlm/model --split dev --count 100
    python -m examples.smolvlm.evaluate_card runs/smolvlm/model --split test --count 200 --write

Run it from the repository root. Each task is measured with each scene's own image and with another scene's, the
shuffled-image control: what is left then was not seen. Generation is greedy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hones_offline.data.examples import Example
from hones_offline.data.scenes import SPLITS
from hones_offline.running.evaluation import Scores, evaluate
from hones_offline.running.models import keep_freed_memory, load_model

from examples.smolvlm.get_model import CARD
from examples.smolvlm.tasks import WAYS, task_examples
from examples.tiny_vlm.evaluate_card import MARKS
from hones_steer.errors import DataError
from hones_steer.files import write_atomically


def with_another_image(examples: Sequence[Example]) -> list[Example]:
    """Every example with its neighbor's image; what is asked and what is right stay."""
    images = [example.image for example in examples]
    return [replace(own, image=image) for own, image in zip(examples, [*images[1:], images[0]], strict=True)]


def table(model: Any, processor: Any, split: str, count: int, batch_size: int) -> str:
    """The card's table in Markdown: a row for each way of asking and each task."""
    lines = [
        f"| asked | task | metric | {split} scenes | own image | 95% interval | another's image | 95% interval |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, tasks in WAYS.items():
        for name in tasks:
            examples = task_examples(name, split, count)
            cells: list[str] = []
            for asked in (examples, with_another_image(examples)):
                scores = evaluate(model, processor, tasks[name], asked, batch_size=batch_size, progress=True)
                cells += _cells(scores)
            lines.append(f"| {way} | {name} | {tasks[name].metric} | {len(examples)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(scores: Scores) -> tuple[str, str]:
    low, high = scores.interval()
    return f"{scores.value:.3f}", f"{low:.3f} – {high:.3f}"


def write_table(card: Path, text: str) -> None:
    """Put a table between the card's marks.

    Raises:
        DataError: the card has no such marks.
    """
    old = card.read_text("utf-8")
    if not all(mark in old for mark in MARKS):
        raise DataError(f"{card} has no lines {' and '.join(MARKS)}; put them where the table belongs")
    before, rest = old.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    write_atomically(card, f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}".encode())


def main() -> None:
    """Print the table; with --write, put it into the card as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="what examples.smolvlm.get_model wrote")
    parser.add_argument("--split", choices=SPLITS, default="dev", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="scenes of each task (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="sequences at a time (%(default)s)")
    parser.add_argument("--write", action="store_true", help="put the table into examples/smolvlm/card.md")
    args = parser.parse_args()
    if args.count < 2:
        parser.error(f"--count must be at least 2, so that there is another image, not {args.count}")
    keep_freed_memory()
    try:
        model, processor = load_model(str(args.model), device="cpu")
        result = table(model, processor, args.split, args.count, args.batch_size)
        print(result)
        if args.write:
            write_table(CARD, result)
    except DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
