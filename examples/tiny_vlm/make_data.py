"""Write scenes of one split as PNG files and one JSONL file per task.

    python -m examples.tiny_vlm.make_data --split discovery --count 200 --output runs/scenes

Run it from the repository root. Each line is {"image": ..., "prompt": ..., "targets": [...]}, the format that
`hones attribute` reads; image paths are relative to the JSONL file. A retrieval scene gives one line per
candidate, the true one first, with "Yes" or "No" as the target.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from hones_offline.data.scenes import SPLITS, TASKS, Scene, scenes


def lines(scene: Scene, task: str, image: str, negatives: int) -> Iterator[dict[str, object]]:
    """The records of one scene and task."""
    if task == "retrieval":
        for i, candidate in enumerate(scene.candidates(negatives)):
            answer = "No" if i else "Yes"
            yield {"image": image, "prompt": scene.prompt(task, candidate), "targets": [answer]}
    else:
        targets = {"vqa": [scene.answer], "ocr": [scene.transcription], "caption": list(scene.captions)}[task]
        yield {"image": image, "prompt": scene.prompt(task), "targets": targets}


def main() -> None:
    """Write the images and the four files into --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, default="discovery")
    parser.add_argument("--count", type=int, default=200, help="scenes")
    parser.add_argument("--negatives", type=int, default=1, help="false candidates per retrieval scene")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    (args.output / "images").mkdir(parents=True, exist_ok=True)
    examples = scenes(args.split, args.count, args.seed)
    names = [f"images/{args.split}-{i:05d}.png" for i in range(len(examples))]
    for scene, name in zip(examples, names, strict=True):
        scene.image().save(args.output / name)
    for task in TASKS:
        with (args.output / f"{task}.jsonl").open("w", encoding="utf-8") as file:
            for scene, name in zip(examples, names, strict=True):
                for record in lines(scene, task, name, args.negatives):
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
