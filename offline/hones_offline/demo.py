"""`hones demo`: the whole promise on the model that ships with hones-steer, in a few minutes on two CPU cores."""

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
from hones_offline.comparison.splits import Splits
from hones_offline.comparison.steering import steering_row
from hones_offline.comparison.study import Study, StudySettings, study, summarize
from hones_offline.data.examples import Example, check_disjoint, scene_examples
from hones_offline.data.scenes import scenes
from hones_offline.data.tasks import TASKS
from hones_offline.learning.factors import FitSettings
from hones_offline.learning.methods import STEERING_METHODS
from hones_offline.running.embedded import load_tiny_vlm
from hones_offline.running.models import keep_freed_memory
from hones_offline.running.prompts import Prepared, prepare, render, tokenizer_of
from hones_offline.running.run_folder import json_bytes, resumable
from hones_steer.files import write_atomically
from hones_steer.huggingface import steer
from hones_steer.profile import save_profile

NEGATIVES = 7
STEERING = ("fixed_amp", "grid_search", "random_neurons", "hones_no_kl", "hones")
"""The ways of steering; learned sparsity would take a third more learning."""
COLUMNS = (
    ("base", "base"),
    ("masked", "masked"),
    ("masked_random", "masked random"),
    *((name, STEERING_METHODS[name].column) for name in STEERING),
)
BATCH = 64
COMPARED = CompareSettings(
    methods=("random", "ap", "ma", "dvp", "hones_task"),
    fractions=(0.1,),
    fraction=0.1,
    seeds=1,
    attribution_examples=128,
    pool=128,
    top_heads=8,
    stages=("masking",),
    fit=FitSettings(epochs=1, lr=0.03, batch_size=32, accumulation_steps=1),
)
SETTINGS = StudySettings(fractions=(0.05, 0.1), steering=STEERING, fit=COMPARED.fit)
COMPARED_ON = 200
"""Test scenes on which the methods are compared; on each every method's banks of all tasks are masked."""
SPLITS = ("discovery", "dev", "test")
Say = Callable[[str], object]


def demo(argv: Sequence[str]) -> int:
    """Entry point of `hones demo`."""
    parser = argparse.ArgumentParser(
        prog="hones demo",
        description="Find task neurons in the small vision-language model that ships with hones-steer, learn a "
        "steering profile per task, measure both against controls on held-out images, and steer four requests "
        "differently in one batch. Takes some minutes on two CPU cores; killed, it goes on where it stopped; finished, "
        "it shows the results again at once.",
        epilog="example: hones demo --out runs/demo && hones inspect runs/demo/profiles/vqa.safetensors",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="run folder (default: %(default)s)"
    )
    for split, count, use in zip(SPLITS, (1536, 200, 600), ("learn from", "choose on", "measure on"), strict=True):
        parser.add_argument(
            f"--{split}", type=int, default=count, metavar="N", help=f"scenes to {use} (default: %(default)s)"
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
    """Study the four tasks on the embedded model; write profiles and summary.json below `out`; show what was found."""
    started = time.monotonic()
    profiles = out / "profiles"
    profiles.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    model, processor = load_tiny_vlm()
    say(
        f"The embedded model on scenes it has not seen: {counts['discovery']} to learn from, {counts['dev']} to choose "
        f"on, {counts['test']} to measure on; retrieval ranks 1 caption among {NEGATIVES} negatives, on half of them, "
        "and learns from a quarter."
    )
    encoded = {name: _encoded(model, processor, name, counts) for name in TASKS}
    compared = {
        name: _splits(out / "work" / "compared" / name, parts, COMPARED_ON // _share(name, "test"))
        for name, parts in encoded.items()
    }
    comparison = Comparison(compared, COMPARED, progress=True)
    seconds: dict[str, float] = {}
    studied: dict[str, Study] = {}
    for name, parts in encoded.items():
        begun = time.monotonic()
        announce = partial(_announce, say, name)
        announce("head scores and neuron importance")
        attribution = comparison.finder.attribution(name, COMPARED.main, seed=0)
        studied[name] = study(_splits(out / "work" / name, parts), attribution, SETTINGS, announce, progress=True)
        save_profile(studied[name].profiles["hones"], profiles / f"{name}.safetensors")
        seconds[name] = round(time.monotonic() - begun, 1)
    say("  every method's banks masked on every task")
    begun = time.monotonic()
    summary = _summary(comparison, studied, counts)
    now = time.monotonic()
    summary["seconds"] = {**seconds, "comparison": round(now - begun, 1), "total": round(now - started, 1)}
    write_atomically(out / "summary.json", json_bytes(summary))
    rows = {name: summarize(result) for name, result in studied.items()}
    for line in [
        *results_table(rows),
        *masking_table(summary),
        *mixed_batch(model, processor, profiles),
    ]:
        say(line)
    say(f"\nProfiles: {profiles}; numbers with intervals: {out / 'summary.json'}; {summary['seconds']['total']:.0f} s.")
    return summary


def _encoded(model: Any, processor: Any, name: str, counts: Mapping[str, int]) -> dict[str, Prepared]:
    """A task's examples, per split."""
    examples = demo_examples(name, counts)
    check_disjoint(**examples)
    return {split: prepare(model, processor, TASKS[name], examples[split], progress=True) for split in SPLITS}


def _splits(path: Path, parts: Mapping[str, Prepared], on: int | None = None) -> Splits:
    """A task's examples with a run folder; with `on` at most so many test examples."""
    test = parts["test"].first(on)
    return Splits(parts["discovery"], parts["dev"], test, path, batch_size=BATCH)


def _summary(comparison: Comparison, studied: Mapping[str, Study], counts: Mapping[str, int]) -> dict[str, Any]:
    """The summary, as every comparison's; steering is each task's study."""
    summary = {
        **header("Four tasks in the embedded vision-language model"),
        **comparison.overview(),
        **comparison.attributions(),
        **comparison.masking(),
        "steering": [
            steering_row(comparison.bootstrap, method, result.test["base"], [result.test[method]])
            for result in studied.values()
            for method in ("base", *STEERING)
        ],
    }
    summary["settings"] |= {
        "scenes": [f"{count} {split}" for split, count in counts.items()],
        "compared_on": COMPARED_ON,
        "retrieval_negatives": NEGATIVES,
        "steered_fractions": [f"{name} {result.bank_fraction:g}" for name, result in studied.items()],
    }
    return summary


def _announce(say: Say, task_name: str, stage: str) -> None:
    say(f"  {task_name}: {stage}")


def demo_examples(task_name: str, counts: Mapping[str, int]) -> dict[str, list[Example]]:
    """The demo's examples of a task, per split."""
    return {
        split: scene_examples(task_name, scenes(split, count // _share(task_name, split)), negatives=NEGATIVES)
        for split, count in counts.items()
    }


def _share(task_name: str, split: str) -> int:
    """One in how many scenes a task uses: retrieval ranks many candidates, and learns five pairs of each example."""
    if task_name != "retrieval":
        return 1
    return 4 if split == "discovery" else 2


def results_table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The one table: a line per task and the mean over tasks, with what each bank's size is."""
    head = f"{'task':10} {'metric':13} {'n':>4} " + " ".join(f"{title:>14}" for _, title in COLUMNS)
    lines = ["", "On test scenes (greedy generation; nothing was chosen on them):", "", head, "-" * len(head)]
    for name, row in rows.items():
        values = " ".join(f"{row[key]:14.3f}" for key, _ in COLUMNS)
        lines.append(f"{name:10} {row['metric']:13} {row['n']:4d} {values}")
    means = " ".join(f"{sum(row[key] for row in rows.values()) / len(rows):14.3f}" for key, _ in COLUMNS)
    lines.append(f"{'mean':10} {'':13} {'':4} {means}")
    lines += ["", "Difference to base with its 95% interval (paired bootstrap over scenes):"]
    for name, row in rows.items():
        parts = [
            f"{title} {row[key] - row['base']:+.3f} [{low:+.3f}, {high:+.3f}]"
            for key, title in COLUMNS
            if key in ("masked", "random_neurons", "hones")
            for low, high in [row["difference_to_base_ci95"][key]]
        ]
        lines.append(f"  {name:10} " + "   ".join(parts))
    sizes = ", ".join(f"{name} {row['bank_fraction']:.1%} ({row['bank_neurons']})" for name, row in rows.items())
    lines += [
        "",
        f"The model is small, so banks are not the paper's 1%: they were sized on dev among "
        f"{', '.join(f'{fraction:.1%}' for fraction in SETTINGS.fractions)} of its neurons: {sizes}.",
        f"'masked random' is the mean of {SETTINGS.random_banks} random banks with as many neurons in each layer.",
    ]
    return lines


def masking_table(summary: Mapping[str, Any]) -> list[str]:
    """The table of metrics lost by the own task and by the others when each method's bank is masked."""
    drops = {(row["task"], row["method"], row["fraction"]): row for row in summary["masking"]}
    n = "/".join(str(task["n"]["test"]) for task in summary["tasks"].values())
    lines = [
        "",
        f"Metric lost by the own task / on average by the others, {COMPARED.fraction:.0%} of the neurons masked "
        f"(on {n} scenes):",
        "",
        f"{'':10}" + "".join(f"{method:>16}" for method in COMPARED.methods),
    ]
    for task in summary["tasks"]:
        cells = [drops[task, method, COMPARED.fraction] for method in COMPARED.methods]
        pairs = [f"{row['own_drop']:.3f} /{row['own_drop'] - row['selectivity']:7.3f}" for row in cells]
        lines.append(f"{task:10}" + "".join(f"{pair:>16}" for pair in pairs))
    lines += ["", "The same of each task (column) when the HONES bank of a task (row) is masked:", ""]
    lines.append(f"{'':12}" + "".join(f"{name:>11}" for name in summary["tasks"]))
    for masked, cells in summary["cross"]["drops"].items():
        lines.append(f"{masked:12}" + "".join(f"{cell['drop']:11.3f}" for cell in cells.values()))
    return lines


def mixed_batch(model: Any, processor: Any, profiles: Path) -> list[str]:
    """Four images, four tasks, one batch: each row steered by its own profile, beside the same row alone."""
    tokenizer = tokenizer_of(processor)
    examples = [scene_examples(name, scenes("test", i + 1), negatives=NEGATIVES)[i] for i, name in enumerate(TASKS)]
    prompts = [TASKS[name].prompts(example)[0] for name, example in zip(TASKS, examples, strict=True)]
    texts = [render(processor, prompt, has_image=True) for prompt in prompts]
    images = [example.image.load() for example in examples if example.image]

    def generate(rows: Sequence[int]) -> list[str]:
        inputs = processor(
            images=[images[i] for i in rows],
            text=[texts[i] for i in rows],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=40)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        decoded: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in decoded]

    everyone = range(len(TASKS))
    with steer(model, {name: profiles / f"{name}.safetensors" for name in TASKS}) as steering:
        plain = generate(everyone)
        with steering.tasks(list(TASKS)):
            mixed = generate(everyone)
        alone = []
        for i, name in enumerate(TASKS):
            with steering.task(name):
                alone += generate([i])
    lines = ["", "One batch, four images, four tasks, each row steered by its own profile:", ""]
    for i, name in enumerate(TASKS):
        same = "same as alone" if mixed[i] == alone[i] else f"ALONE IT IS: {alone[i]}"
        lines.append(f"  {name:10} {mixed[i]}   ({same}; unsteered: {plain[i]})")
    return lines
