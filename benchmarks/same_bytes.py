"""Whether two trees give the same results, byte for byte: what a change of structure must not change.

    .venv/bin/python benchmarks/same_bytes.py OLD NEW --quick

OLD and NEW are checkouts. The commands of the offline package (`attribute`, `fit`, `evaluate`, `demo`, `report`) and a
comparison of all methods (`compare`) run in both on the embedded model, each as a process of its own that imports the
tree's own packages, with the same number of threads: another number changes the order of sums and so the last bits.
Then what they print and write is compared. The columns of the table:

    files    result files (profiles, result.json, summary.json, pages), which must exist in both and be equal
    steps    files of run folders with the same name in both, which must be equal
    moved    tensors (or files of another kind) in files that only the old tree has, which are in files, of any name,
             that only the new one has
    old, new those that are in one tree only: the run folder's layout may change
    outcome  "same", or the first difference: file, then key, tensor and element, or line

Times are removed first: `created` and `seconds` in JSON, the demo's last number. Pages are made of a summary whose
times are already fixed. `run.json` holds a run folder's settings, which may change with its layout: a difference is
told, but is no failure. The exit code is 1 if anything else differs or a command fails.

Everything is kept in --results, one folder for each state of a tree (its name and a digest of its packages), so that a
second call only runs what is new; OLD alone runs one tree without comparing. Without --quick it takes half an hour on
one core, half of it the whole demo; with it, some minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = {"hones_steer": ".", "hones_offline": "offline", "hones_serving": "serving"}
"""Where a tree has each package, for its import path."""
COMMANDS = ("attribute", "fit", "evaluate", "demo", "compare", "report")
TASKS = ("vqa", "ocr", "caption", "retrieval")
SCENES = {"discovery": 128, "dev": 24, "test": 32}
"""Scenes that the commands' data show, per split; discovery is mostly limited to the first 32."""
MODEL = "../inputs/model"
WRITTEN_JSON = ("result.json", "summary.json", "report.json")


# ------------------------------------------------------------------------------------------------ what is run


@dataclass(frozen=True)
class Step:
    """One command: it runs in the folder of its tree and writes into the folder of its name."""

    name: str
    arguments: tuple[str, ...]
    quick: bool = False
    """Whether --quick has it, too."""
    summary_of: str | None = None
    """A step whose summary, with its times fixed, is copied here before this one runs."""

    @property
    def command(self) -> str:
        """The part of --only that it belongs to."""
        return self.arguments[0]

    @property
    def needs(self) -> set[str]:
        """Names of the steps in whose folders it reads or writes."""
        folders = {Path(argument).parts[0] for argument in self.arguments if "/" in argument}
        return (folders | {self.summary_of or self.name}) - {"..", self.name}


def steps() -> list[Step]:
    """All of them, each after the ones that it needs."""
    return [*_attribute_steps(), *_fit_steps(), *_evaluate_steps(), *_summary_steps()]


def _data(task: str, split: str) -> tuple[str, ...]:
    if task == "retrieval":
        return ("--task", task, "--data", f"../inputs/{split}/coco.json", "--images", "../inputs", "--negatives", "4")
    own = ("--metric", "anls", "--max-new-tokens", "8") if task == "questions" else ()
    return ("--task", task, "--data", f"../inputs/{split}/{task}.jsonl", *own)


def _attribute(name: str, task: str, *options: str, limit: int = 32, quick: bool = False) -> Step:
    method = () if "--method" in options else ("--method", "hones", "--top-heads", "6")
    sizes = ("--limit", str(limit), *method, "--top-fraction", "0.05")
    arguments = ("attribute", MODEL, *_data(task, "discovery"), *sizes, "--out", f"{name}/run", *options)
    return Step(name, arguments, quick)


def _attribute_steps() -> list[Step]:
    return [
        _attribute("attribute-vqa", "vqa", quick=True),
        _attribute("attribute-ocr", "ocr", "--json"),
        _attribute("attribute-caption", "caption", quick=True),
        _attribute("attribute-retrieval", "retrieval", "--json", quick=True),
        _attribute("attribute-questions", "questions", "--seed", "1"),
        _attribute("attribute-logprob", "vqa", "--head-metric", "logprob", "--json", quick=True),
        _attribute("attribute-logprob-retrieval", "retrieval", "--head-metric", "logprob"),
        _attribute("attribute-race", "vqa", "--heads", "race", limit=128, quick=True),
        _attribute("attribute-race-logprob", "vqa", "--heads", "race", "--head-metric", "logprob", limit=128),
        _attribute("attribute-contrastive", "vqa", "--target", "contrastive", "--positive-part", "example", quick=True),
        _attribute("attribute-centred", "ocr", "--target", "centred", "--head-weights", "rank", quick=True),
        _attribute("attribute-small-batches", "caption", "--batch-size", "5", "--memory-gb", "0.001"),
        *(
            _attribute(f"attribute-{method}", "vqa", "--method", method)
            for method in ("ap", "ma", "grad_act", "random")
        ),
        _attribute("attribute-dvp", "vqa", "--method", "dvp", quick=True),
        _attribute("attribute-dvp-contrastive", "caption", "--method", "dvp", "--target", "contrastive"),
        _attribute("attribute-against", "vqa", "--against", "attribute-caption/run", quick=True),
        _attribute("attribute-same-again", "vqa", "--out", "attribute-vqa/run"),
    ]


def _fit(name: str, task: str, *options: str, quick: bool = False) -> Step:
    bank = f"attribute-{task}"
    dev = "../inputs/dev/" + ("coco.json" if task == "retrieval" else f"{task}.jsonl")
    sizes = ["--limit", "24", "--fit-batch-size", "8"]
    if not {"fixed_amp", "grid_search"} & set(options):
        sizes += ["--lr", "0.1", "--epochs", "2"]
    files = ("--bank", f"{bank}/run", "--dev", dev, "--state", f"{name}/run", "--out", f"{name}/profile.safetensors")
    return Step(name, ("fit", MODEL, *_data(task, "discovery"), *sizes, *files, *options), quick)


def _fit_steps() -> list[Step]:
    return [
        _fit("fit-vqa", "vqa", "--description", "answers questions", "--license", "apache-2.0", "--json", quick=True),
        _fit("fit-ocr", "ocr", "--gradient-checkpointing", "--accumulation-steps", "2"),
        _fit("fit-caption", "caption", "--beta-kl", "0.5", "--seed", "7"),
        _fit("fit-retrieval", "retrieval", quick=True),
        _fit("fit-questions", "questions", "--json"),
        *(
            _fit(f"fit-{method}", "vqa", "--method", method, quick=method == "grid_search")
            for method in ("hones_no_kl", "random_neurons", "fixed_amp", "grid_search")
        ),
    ]


def _evaluate(name: str, task: str, *options: str, quick: bool = False) -> Step:
    return Step(name, ("evaluate", MODEL, *_data(task, "test"), *options), quick)


def _evaluate_steps() -> list[Step]:
    vqa = ("--profile", "fit-vqa/profile.safetensors", "--profile", "fit-grid_search/profile.safetensors")
    masks = ("--mask", "attribute-vqa/run", "--mask", "attribute-caption/run", "--random-banks", "2")
    apart = ("--apart-from", "../inputs/discovery/vqa.jsonl")
    excerpt = ("../inputs/excerpt/coco_excerpt.json", "--images", "../inputs/excerpt")
    return [
        _evaluate("evaluate-vqa", "vqa", *vqa, *masks, *apart, "--json", quick=True),
        _evaluate("evaluate-ocr", "ocr", "--mask", "attribute-vqa/run", "--batch-size", "5"),
        _evaluate("evaluate-caption", "caption", "--mask", "attribute-caption/run", "--random-banks", "1", quick=True),
        _evaluate("evaluate-retrieval", "retrieval", "--profile", "fit-retrieval/profile.safetensors", quick=True),
        _evaluate("evaluate-questions", "questions", "--profile", "fit-questions/profile.safetensors"),
        *(
            Step(
                f"evaluate-excerpt-{task}",
                ("evaluate", MODEL, "--task", task, "--data", *excerpt, "--negatives", "4", "--max-failures", "0.5"),
            )
            for task in TASKS
        ),
    ]


def _summary_steps() -> list[Step]:
    small = ("--discovery", "24", "--dev", "12", "--test", "12")
    return [
        Step("demo-small", ("demo", "--out", "demo-small/run", *small), quick=True),
        Step("demo-small-again", ("demo", "--out", "demo-small/run", *small, "--json"), quick=True),
        Step("compare", ("compare", "compare/run"), quick=True),
        Step("demo", ("demo", "--out", "demo/run")),
        *(
            Step(f"report-{of}", ("report", f"report-{of}", *options), quick=of != "demo", summary_of=of)
            for of, options in {"demo-small": (), "compare": ("--json",), "demo": ()}.items()
        ),
    ]


def chosen(only: Sequence[str], quick: bool) -> list[Step]:
    """The steps asked for and all that they need, in order."""
    every = {step.name: step for step in steps()}
    names = {name for name, step in every.items() if (step.quick or not quick) and step.command in only}
    waiting = list(names)
    while waiting:
        needed = every[waiting.pop()].needs - names
        names |= needed
        waiting += needed
    return [step for name, step in every.items() if name in names]


# ------------------------------------------------------------------------- inside a tree: its packages, its Python


def inside(arguments: Sequence[str]) -> int:
    """Run in a process of a tree's: a `hones` command, or one of the two below."""
    import hones_offline

    import hones_steer

    tree = Path(os.environ["HONES_TREE"])
    for package in (hones_offline, hones_steer):
        if not Path(str(package.__file__)).is_relative_to(tree):
            raise SystemExit(f"{package.__name__} is that of {package.__file__}, not that of {tree}")
    match arguments:
        case ["inputs", folder]:
            write_inputs(Path(folder), tree)
        case ["compare", folder]:
            run_comparison(Path(folder))
        case _:
            from hones_steer.cli import main as hones

            return hones(arguments)
    return 0


def write_inputs(folder: Path, tree: Path) -> None:
    """The embedded model, and scenes as the commands read them: JSONL and COCO-format files beside their images."""
    from hones_offline.examples import scene_examples
    from hones_offline.scenes import scenes
    from PIL import Image

    shutil.copytree(tree / "examples/tiny_vlm/checkpoint", folder / "model")
    for split, count in SCENES.items():
        (folder / split).mkdir()
        pictures = scenes(split, count)
        examples = {task: scene_examples(task, pictures) for task in ("vqa", "ocr", "caption")}
        lines: dict[str, list[dict[str, Any]]] = {task: [] for task in (*examples, "questions")}
        records = []
        for i, scene in enumerate(pictures):
            name = f"{split}-{i:03}.png"
            scene.image().save(folder / split / name)
            for task, of_task in examples.items():
                prompt, targets = of_task[i].prompt or "What is there?", list(of_task[i].targets)
                lines[task].append({"image": name, "prompt": prompt, "targets": targets})
            lines["questions"].append({"image": name, "prompt": scene.prompt("vqa"), "targets": [scene.answer]})
            captions = [{"caption": caption} for caption in scene.captions]
            records.append({"image_id": i, "image_info": {"file_name": f"{split}/{name}"}, "retrieval": captions})
        for task, of_file in lines.items():
            text = "".join(json.dumps(line) + "\n" for line in of_file)
            (folder / split / f"{task}.jsonl").write_text(text, encoding="utf-8")
        (folder / split / "coco.json").write_text(json.dumps({"data": records}), encoding="utf-8")
    excerpt = tree / "tests/offline/data/coco_excerpt.json"
    (folder / "excerpt").mkdir()
    shutil.copy(excerpt, folder / "excerpt")
    for record in json.loads(excerpt.read_bytes())["data"]:
        info = record["image_info"]
        Image.new("RGB", (info["width"], info["height"]), "gray").save(folder / "excerpt" / info["file_name"])


def run_comparison(out: Path) -> None:
    """All methods, some variants and every stage on few scenes, under import paths that hold in both trees."""
    from hones_offline.comparison import compare
    from hones_offline.embedded import load_tiny_vlm
    from hones_offline.examples import scene_examples
    from hones_offline.finding import METHODS, STAGES, CompareSettings
    from hones_offline.fit import FitSettings
    from hones_offline.prompts import prepare
    from hones_offline.scenes import scenes
    from hones_offline.study import Splits
    from hones_offline.tasks import TASKS as TASKS_BY_NAME

    variants = ("hones_logprob:rank+damage", "hones_task:leave_out+centred+example", "hones_task:ratio")
    settings = CompareSettings(
        methods=(*sorted(METHODS), *variants, "dvp:centred", "ap:max"),
        main="hones_task",
        fractions=(0.05, 0.1),
        fraction=0.1,
        sweep=("hones_task", "ape"),
        seeds=2,
        attribution_examples=12,
        pool=20,
        top_heads=6,
        stages=STAGES,
        learned_seeds=1,
        strengths=(-1.0, 2.0),
        fit=FitSettings(epochs=1, lr=0.1, batch_size=8, accumulation_steps=1),
    )
    model, processor = load_tiny_vlm()
    tasks = {}
    for name in ("vqa", "caption", "retrieval"):
        examples = {
            split: scene_examples(name, scenes(split, count), negatives=3)
            for split, count in {"discovery": 20, "dev": 8, "test": 12}.items()
        }
        encoded = {split: prepare(model, processor, TASKS_BY_NAME[name], some) for split, some in examples.items()}
        tasks[name] = Splits(**encoded, run_path=out / "work" / name, batch_size=16)
    compare(tasks, settings, out, title="A small comparison", report=print)


# ----------------------------------------------------------------------------------------------- running it


@dataclass(frozen=True)
class Tree:
    """A checkout, the Python that runs it, and the folder that its results are kept in."""

    root: Path
    python: Path
    threads: int
    results: Path

    @classmethod
    def at(cls, root: Path, python: Path | None, threads: int, results: Path) -> Tree:
        """The tree in a folder; its results are named by the folder and a digest of the packages in it."""
        root = root.resolve()
        digest = hashlib.sha256()
        for top in ("hones_steer", "offline"):
            for file in sorted((root / top).rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    digest.update(
                        f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
                    )
        return cls(
            root, python or root / ".venv/bin/python", threads, results / f"{root.name}-{digest.hexdigest()[:12]}"
        )

    def environment(self) -> dict[str, str]:
        """Variables for a process that imports this tree's packages."""
        metadata = self.results / "hones_steer-0.dist-info"  # the tree's own commands, whatever is installed
        if not metadata.exists():
            metadata.mkdir(parents=True)
            project = tomllib.loads((self.root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            points = "".join(f"{name} = {value}\n" for name, value in project["entry-points"]["hones.commands"].items())
            (metadata / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: hones-steer\nVersion: {project['version']}\n"
            )
            (metadata / "entry_points.txt").write_text(f"[hones.commands]\n{points}")
        paths = [self.results, *(self.root / folder for folder in PACKAGES.values())]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TZ": "UTC", "COLUMNS": "120"}
        python_path = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HONES_TREE": str(self.root)}
        return {**os.environ, **fixed, **threads, **python_path}

    def call(self, arguments: Sequence[str], folder: Path) -> tuple[int, bytes, bytes]:
        """Exit code, output and errors of `inside` in a process of this tree's."""
        process = [str(self.python), "-P", str(Path(__file__).resolve()), "--inside", *arguments]
        done = subprocess.run(process, cwd=folder, env=self.environment(), capture_output=True, check=False)
        return done.returncode, done.stdout, done.stderr

    def run(self, step: Step, again: bool) -> bool:
        """Run a step unless it is done, and say whether it ran; started before and killed, it is resumed."""
        folder = self.results / step.name
        source = inspect.getsource(run_comparison) if step.command == "compare" else ""
        told = json.dumps(
            {"arguments": step.arguments, "threads": self.threads} | ({"source": source} if source else {})
        )
        command, done = folder / "command.json", folder / "done.json"
        if again or not command.exists() or command.read_text() != told:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            command.write_text(told)
        if done.exists() and not self.failure(step):
            return False
        if step.summary_of:
            summary = self.results / step.summary_of / "run/summary.json"
            (folder / "summary.json").write_bytes(without_times(summary.read_bytes()))
        started = time.monotonic()
        code, output, errors = self.call(step.arguments, self.results)
        (folder / "stdout").write_bytes(output)
        (folder / "stderr").write_bytes(errors.replace(str(self.root).encode(), b"TREE"))
        done.write_text(json.dumps({"code": code, "seconds": round(time.monotonic() - started, 1)}))
        return True

    def failure(self, step: Step) -> str | None:
        """Why a step's results are of no use, if so."""
        folder = self.results / step.name
        code = json.loads((folder / "done.json").read_bytes())["code"]
        if code == 0:
            return None
        said = (folder / "stderr").read_text(errors="replace").strip().splitlines()
        return f"exit code {code}: {said[-1] if said else 'nothing said'}"


def run_all(trees: Iterable[Tree], wanted: Sequence[Step], again: bool) -> None:
    """Run every step in every tree, each told as it ends."""
    for tree in trees:
        inputs = tree.results.parent / "inputs"
        if not inputs.exists():
            draft = inputs.with_name("inputs-unfinished")
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            code, _, errors = tree.call(["inputs", str(draft)], draft)
            if code:
                raise SystemExit(f"the inputs cannot be made in {tree.root}: {errors.decode(errors='replace')}")
            draft.rename(inputs)
        for number, step in enumerate(wanted, start=1):
            failed = [needed for needed in wanted if needed.name in step.needs and tree.failure(needed)]
            if failed:
                raise SystemExit(f"{tree.root}: {step.name} needs {failed[0].name}, which failed; see {tree.results}")
            ran = tree.run(step, again)
            done = json.loads((tree.results / step.name / "done.json").read_bytes())
            how = f"{done['seconds']} s" if ran else "kept"
            print(f"{tree.root} {number}/{len(wanted)} {step.name}: {how}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------ times, differences

_CREATED = re.compile(rb'"created": "[^"]*"')
_SECONDS = re.compile(rb'"seconds": \{[^}]*\}')
_LAST_NUMBER = re.compile(rb"; \d+ s\.$", re.MULTILINE)


def without_times(data: bytes) -> bytes:
    """The same JSON or text with each time in it replaced by a fixed one."""
    data = _CREATED.sub(b'"created": "2000-01-01T00:00:00+00:00"', data)
    data = _SECONDS.sub(lambda found: re.sub(rb": [0-9.e+-]+", b": 1.0", found[0]), data)
    return _LAST_NUMBER.sub(b"; 1 s.", data)


def first_difference(name: str, old: bytes, new: bytes) -> str | None:
    """Where two files of one name first differ, times apart; None if nowhere.

    Tensors are told by name and element, JSON by its path, other text by its line, anything else by the byte.
    """
    if name.endswith(".safetensors"):
        return None if old == new else _tensor_difference(old, new)
    old, new = without_times(old), without_times(new)
    if old == new:
        return None
    return _json_difference(old, new) or _line_difference(old, new)


def _tensor_difference(old: bytes, new: bytes) -> str:
    (old_header, old_start), (new_header, new_start) = _header(old), _header(new)
    for path, one, two in _differing(
        {name: _kind(entry) for name, entry in old_header.items()},
        {name: _kind(entry) for name, entry in new_header.items()},
        "header",
    ):
        return f"{path}: {one} / {two}"
    for name, entry in old_header.items():
        if name == "__metadata__":
            continue
        (first, last), (new_first, new_last) = entry["data_offsets"], new_header[name]["data_offsets"]
        one, two = old[old_start + first : old_start + last], new[new_start + new_first : new_start + new_last]
        if one != two:
            return f"tensor {name}{_element(entry, one, two)}"
    return "the same metadata and tensors, laid out otherwise"


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data start."""
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header, 8 + length


def _kind(entry: dict[str, Any]) -> dict[str, Any]:
    """A header's entry without the place of its data."""
    return {key: value for key, value in entry.items() if key != "data_offsets"}


_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1", "BOOL": "?"}


def _element(entry: dict[str, Any], old: bytes, new: bytes) -> str:
    """The first element that differs, its values, and how many do."""
    byte = _first_byte(old, new)
    if entry["dtype"] not in _NUMPY:
        return f": byte {byte}"
    arrays = [np.frombuffer(data, _NUMPY[entry["dtype"]]) for data in (old, new)]
    element = byte // arrays[0].itemsize
    index = [int(i) for i in np.unravel_index(element, entry["shape"] or (1,))]
    width = arrays[0].itemsize
    different = np.count_nonzero((np.frombuffer(old, "u1") != np.frombuffer(new, "u1")).reshape(-1, width).any(axis=1))
    values = " / ".join(repr(array[element].item()) for array in arrays)
    return f"{index}, byte {byte}: {values} ({different} of {arrays[0].size} elements differ)"


def _json_difference(old: bytes, new: bytes) -> str | None:
    """The path of the first value that differs; None if one of them is no JSON, or only the writing differs."""
    try:
        one, two = json.loads(old), json.loads(new)
    except ValueError:
        return None
    for path, mine, theirs in _differing(one, two, ""):
        return f"{path}: {mine} / {theirs}"
    return None


def _differing(old: Any, new: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """(path, old value, new value) of every difference between two JSON values."""
    match old, new:
        case dict(), dict():
            for key in sorted(old.keys() | new.keys()):
                inner = f"{path}.{key}" if path else key
                if key in old and key in new:
                    yield from _differing(old[key], new[key], inner)
                else:
                    yield (
                        inner,
                        _short(old[key]) if key in old else "absent",
                        _short(new[key]) if key in new else "absent",
                    )
        case list(), list():
            for i, (mine, theirs) in enumerate(zip(old, new, strict=False)):
                yield from _differing(mine, theirs, f"{path}[{i}]")
            if len(old) != len(new):
                yield path, f"{len(old)} entries", f"{len(new)} entries"
        case _:
            if type(old) is not type(new) or old != new:
                yield path, _short(old), _short(new)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, bytes) else repr(value)[1:]
    return text if len(text) <= 60 else f"{text[:57]}…"


def _line_difference(old: bytes, new: bytes) -> str:
    lines = zip(old.split(b"\n"), new.split(b"\n"), strict=False)
    for number, (one, two) in enumerate(lines, start=1):
        if one != two:
            start = max(0, _first_byte(one, two) - 20)  # some of what comes before, to recognize the place
            return f"line {number}, byte {_first_byte(one, two)}: {_short(one[start:])} / {_short(two[start:])}"
    return f"{len(old)} bytes / {len(new)} bytes"


def _first_byte(old: bytes, new: bytes) -> int:
    return next((i for i, (one, two) in enumerate(zip(old, new, strict=False)) if one != two), min(len(old), len(new)))


# ------------------------------------------------------------------------------------------------- comparing


@dataclass
class Row:
    """The result of comparing a step."""

    step: str
    files: int = 0
    steps: int = 0
    moved: int = 0
    old: int = 0
    new: int = 0
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare_folders(name: str, old: Path, new: Path) -> Row:
    """Compare what a step left in two trees; see the file's top for what is counted."""
    row = Row(name)
    files = [
        {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
        for folder in (old, new)
    ]
    for of_tree in files:
        for ours in ("command.json", "done.json"):
            of_tree.pop(ours, None)
    ones, twos = files
    for path in sorted(ones.keys() | twos.keys(), key=lambda path: (not is_result(path), path)):
        if path in ones and path in twos:
            difference = first_difference(path, ones[path].read_bytes(), twos[path].read_bytes())
            row.files, row.steps = row.files + is_result(path), row.steps + (not is_result(path))
            if difference:
                told = row.notes if Path(path).name == "run.json" else row.differences
                told.append(f"{path}: {difference}")
        elif is_result(path):
            row.differences.append(f"{path}: {'missing in the new tree' if path in ones else 'new'}")
    _count_moved(
        row, [ones[path] for path in ones.keys() - twos.keys()], [twos[path] for path in twos.keys() - ones.keys()]
    )
    return row


def is_result(path: str) -> bool:
    """Whether a file is a result rather than a step of a run folder: what a user is told of, and what is printed."""
    *folders, name = Path(path).parts
    return len(folders) == 0 or name in WRITTEN_JSON or folders[-1] == "profiles"


def _count_moved(row: Row, old: Iterable[Path], new: Iterable[Path]) -> None:
    """Count the contents of files that only one tree has; a result file among them was told as a difference already."""
    in_old, in_new = (Counter(part for file in files for part in _contents(file)) for files in (old, new))
    row.moved = (in_old & in_new).total()
    row.old, row.new = in_old.total() - row.moved, in_new.total() - row.moved


def _contents(file: Path) -> list[str]:
    """Digests of a file's tensors, whatever their names and shapes; of the whole file if it has none."""
    data = file.read_bytes()
    if file.suffix != ".safetensors":
        return [hashlib.sha256(data).hexdigest()]
    header, start = _header(data)
    parts = []
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            parts.append(hashlib.sha256(entry["dtype"].encode() + data[start + first : start + last]).hexdigest())
    return parts


def compare_trees(old: Tree, new: Tree, wanted: Sequence[Step]) -> list[Row]:
    """A row per step."""
    rows = []
    for step in wanted:
        row = compare_folders(step.name, old.results / step.name, new.results / step.name)
        failures = {tree.root: failure for tree in (old, new) if (failure := tree.failure(step))}
        row.differences[:0] = [f"{root}: {failure}" for root, failure in failures.items()]
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> list[str]:
    """Lines for a terminal."""
    width = max(len(row.step) for row in rows)
    lines = [f"{'step':{width}} {'files':>5} {'steps':>5} {'moved':>5} {'old':>4} {'new':>4}  outcome"]
    for row in rows:
        more = f" (and {len(row.differences) - 1} more)" if len(row.differences) > 1 else ""
        outcome = f"DIFFERS: {row.differences[0]}{more}" if row.differences else "same"
        counts = f"{row.files:5} {row.steps:5} {row.moved:5} {row.old:4} {row.new:4}"
        lines.append(f"{row.step:{width}} {counts}  {outcome}")
        lines += [f"{'':{width}} {'':27}  note: {note}" for note in row.notes[:1]]
    differing = sum(bool(row.differences) for row in rows)
    return [
        *lines,
        "",
        f"{differing} of {len(rows)} steps differ" if differing else f"all {len(rows)} steps are the same",
    ]


def _versions(tree: Tree) -> str:
    names = ("torch", "transformers", "numpy", "safetensors", "tokenizers")
    code = f"import sys, importlib.metadata as m; print(sys.version, *(f'{{n}} {{m.version(n)}}' for n in {names}))"
    return subprocess.run([tree.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Run and compare; 1 if anything differs."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--inside"]:
        return inside(arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD", help="a checkout")
    parser.add_argument("new", type=Path, metavar="NEW", nargs="?", help="another; without it OLD is only run")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=COMMANDS, help="these, and what they need")
    parser.add_argument("--quick", action="store_true", help="fewer cases, without the whole demo")
    parser.add_argument("--again", action="store_true", help="run what was run before, too")
    parser.add_argument("--python", type=Path, metavar="FILE", help="for both (default: each tree's .venv/bin/python)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each process (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=Path("runs/same-bytes"), metavar="DIR", help="kept (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print rows instead of a table")
    args = parser.parse_args(arguments)
    results = args.results.resolve()
    trees = [Tree.at(root, args.python, args.threads, results) for root in (args.old, args.new) if root]
    if len({_versions(tree) for tree in trees}) > 1:
        print("warning: the trees' packages have other versions:", *map(_versions, trees), sep="\n  ", file=sys.stderr)
    wanted = chosen(args.only, args.quick)
    run_all(trees, wanted, args.again)
    if args.new is None:
        return int(any(trees[0].failure(step) for step in wanted))
    rows = compare_trees(*trees, wanted)
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else "\n".join(table(rows)))
    return int(any(row.differences for row in rows))


if __name__ == "__main__":
    sys.exit(main())
