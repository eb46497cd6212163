"""Write examples of a task, asked in words, as JSONL with their pictures: what `hones learn` takes.

    python -m examples.smolvlm.make_data --task ocr --count 300 --output runs/smolvlm/ocr

Run it from the repository root. A line of OUTPUT/data.jsonl is {"image": ..., "prompt": ..., "targets": [...]}; image
paths are relative to it. With --another-image every example has another's picture, as in the card's control. Retrieval
has no such form: its prompts are ranked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hones_offline.data.examples import Example
from hones_offline.data.scenes import SPLITS

from examples.smolvlm.evaluate_card import with_another_image
from examples.smolvlm.tasks import WAYS, task_examples
from hones_steer.files import write_atomically

ASKED = {name: task for name, task in WAYS["words"].items() if task.kind == "generate"}


def write(task: str, examples: list[Example], folder: Path) -> None:
    """Write the examples into a folder, which is made."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for example in examples:
        name = f"images/{example.id}.png"
        if example.image is not None:
            example.image.load().save(folder / name)
        record = {"image": name, "prompt": ASKED[task].prompts(example)[0], "targets": list(example.targets)}
        lines.append(f"{json.dumps(record)}\n")
    write_atomically(folder / "data.jsonl", "".join(lines).encode())


def main() -> None:
    """Write the pictures and data.jsonl into --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(ASKED), required=True)
    parser.add_argument("--split", choices=SPLITS, default="discovery", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=300, metavar="N", help="examples (default: %(default)s)")
    parser.add_argument("--another-image", action="store_true", help="give each example its neighbor's picture")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    if args.count < 1 + args.another_image:
        parser.error(f"--count must be at least {1 + args.another_image}, not {args.count}")
    examples = task_examples(args.task, args.split, args.count)
    write(args.task, with_another_image(examples) if args.another_image else examples, args.output)
    print(f"{args.output / 'data.jsonl'}: {args.count} examples of {args.task}")


if __name__ == "__main__":
    main()
