"""The command `hones demo`, and the run: four tasks, each as it is, asked for in words, and steered in several ways."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hones_offline.comparison.comparison import Comparison, header
from hones_offline.comparison.settings import CompareSettings
from hones_offline.comparison.splits import Splits, Steered
from hones_offline.demo.adapters import adapter_rows
from hones_offline.demo.answers import before_and_after, mixed_batch
from hones_offline.demo.data_set import NEGATIVES, SCENE_TASKS, SPLITS, SceneExample, data_set
from hones_offline.demo.measured import Asked, Measured, Row, ask_in_words
from hones_offline.demo.picture import picture
from hones_offline.demo.settings import BATCH, COMPARED, COMPARED_ON, DEFAULT, SCENES
from hones_offline.demo.text import comparison_table, content_table, masking_table, promise, title
from hones_offline.running.embedded import load_tiny_vlm
from hones_offline.running.models import keep_freed_memory
from hones_offline.running.prompts import prepare
from hones_offline.running.run_folder import json_bytes, resumable
from hones_steer.files import write_atomically
from hones_steer.profile import Profile, save_profile

Say = Callable[[str], object]
Examples = Mapping[str, Sequence[SceneExample]]
WAYS = ("grid_search", *COMPARED.selections)
"""The ways of steering that a run learns, in the order in which they are shown."""


def demo(argv: Sequence[str]) -> int:
    """Entry point of `hones demo`."""
    parser = argparse.ArgumentParser(
        prog="hones demo",
        description="Steer the small vision-language model that ships with hones-steer toward four tasks whose "
        "conventions it does not know: find neurons, learn a profile per task, measure it on held-out images beside "
        "the model as it is, the model asked in words, and other ways of steering, and steer four requests differently "
        "in one batch. Takes some minutes on two CPU cores; killed, it goes on where it stopped; finished, it shows "
        "the results again.",
        epilog="example: hones demo --out runs/demo && hones inspect runs/demo/profiles/vqa.safetensors",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="run folder (default: %(default)s)"
    )
    for split, use in zip(SPLITS, ("learn from", "choose on", "measure on"), strict=True):
        parser.add_argument(
            f"--{split}", type=int, default=SCENES[split], metavar="N", help=f"scenes to {use} (default: %(default)s)"
        )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of the tables")
    args = parser.parse_args(argv)
    counts = {split: getattr(args, split) for split in SPLITS}
    for split, count in counts.items():
        if count < 4:
            parser.error(f"--{split} must be at least 4, not {count}")
    say: Say = partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    with resumable():
        summary = run_demo(args.out, counts, say)
    if args.json:
        print(json.dumps(summary, indent=1, sort_keys=True))
    return 0


def run_demo(out: Path, counts: Mapping[str, int], say: Say) -> dict[str, Any]:
    """Run it; write profiles, summary.json and picture.svg below `out`; show what was found."""
    started = time.monotonic()
    (out / "profiles").mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    model, processor = load_tiny_vlm()
    say(
        f"The embedded model on scenes it has not seen, of a data set whose conventions it does not know: "
        f"{counts['discovery']} to learn from, {counts['dev']} to choose on, {counts['test']} to measure on; retrieval "
        f"ranks 1 caption among {NEGATIVES} negatives, on half of them, and learns from a quarter."
    )
    examples = {name: data_set(name, counts) for name in SCENE_TASKS}
    splits, comparison = prepared_for(model, processor, examples, out / "work", COMPARED)
    profiles: dict[str, Profile] = {}
    asked: dict[str, Asked] = {}
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    for name, of_task in splits.items():
        begun = time.monotonic()
        say(f"  {name}: as it is, and asked for in words")
        asked[name] = ask_in_words(model, processor, of_task, examples[name])
        measured = Measured(comparison.bootstrap, of_task, asked[name])
        steered: dict[str, Steered] = {}
        for way in WAYS:
            say(f"  {name}: {title(way)}, chosen on dev")
            steered[way] = comparison.steering.selected(name, way, 0)
        say(f"  {name}: everything on test")
        learned = steered[DEFAULT]
        assert isinstance(learned, Profile)  # adapters are not learned here
        steered[DEFAULT] = profiles[name] = measured.with_evidence(learned)
        save_profile(profiles[name], out / "profiles" / f"{name}.safetensors")
        rows += task_rows(comparison, measured, steered)
        seconds[name] = round(time.monotonic() - begun, 1)
    adapters, note = adapter_rows(splits)
    rows += adapters
    say("  every selection's bank set to 0, on every task")
    begun = time.monotonic()
    summary = {**summary_of(comparison, counts), "steering": rows}
    now = time.monotonic()
    summary["seconds"] = {**seconds, "comparison": round(now - begun, 1), "total": round(now - started, 1)}
    write_atomically(out / "summary.json", json_bytes(summary))
    write_atomically(out / "picture.svg", picture(rows).encode())
    words = {name: of_task.words for name, of_task in asked.items()}
    tests = {name: of_task["test"] for name, of_task in examples.items()}
    for line in [
        *promise(summary),
        *content_table(summary),
        *before_and_after(model, processor, tests, words, profiles),
        *comparison_table(summary, note),
        *masking_table(summary),
        *mixed_batch(model, processor, out / "profiles"),
    ]:
        say(line)
    say(
        f"\nProfiles: {out / 'profiles'}; all numbers: {out / 'summary.json'} (`hones report {out}`); a picture: "
        f"{out / 'picture.svg'}; {summary['seconds']['total']:.0f} s."
    )
    return summary


def prepared_for(
    model: Any, processor: Any, examples: Mapping[str, Examples], work: Path, settings: CompareSettings
) -> tuple[dict[str, Splits], Comparison]:
    """Every task's splits, encoded, and a comparison on the same with fewer test examples, for what takes many."""
    splits, fewer = {}, {}
    for name, of_task in examples.items():
        parts = {split: prepare(model, processor, SCENE_TASKS[name], of_task[split], progress=True) for split in SPLITS}
        splits[name] = Splits(**parts, run_path=work / name, batch_size=BATCH)
        parts["test"] = parts["test"].first(COMPARED_ON)
        fewer[name] = Splits(**parts, run_path=work / "compared" / name, batch_size=BATCH)
    return splits, Comparison(fewer, settings, progress=True)


def task_rows(comparison: Comparison, measured: Measured, steered: Mapping[str, Steered]) -> list[Row]:
    """The rows of a task: unsteered, and steered in each way."""
    name = measured.splits.task.name
    rows = measured.unsteered_rows()
    for way, one in steered.items():
        row = measured.steered_row(way, one) | comparison.steering.elsewhere(name, [one])
        if way == DEFAULT:
            row |= measured.over(one, {other: steered[other] for other in WAYS if other != DEFAULT})
        rows.append(row)
    return rows


def summary_of(comparison: Comparison, counts: Mapping[str, int]) -> dict[str, Any]:
    """The summary, as every comparison's, but for the rows of steering."""
    summary = {
        **header("Four tasks in the embedded vision-language model"),
        **comparison.overview(),
        **comparison.attributions(),
        **comparison.masking(),
    }
    summary["settings"] |= {
        "scenes": [f"{count} {split}" for split, count in counts.items()],
        "compared_on": COMPARED_ON,
        "retrieval_negatives": NEGATIVES,
    }
    return summary
