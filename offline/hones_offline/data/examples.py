"""Examples of a task (an image, a prompt, targets): read from a user's JSONL file or made from generated scenes.

`datasets.py` reads published datasets. Every loader returns `Loaded(examples, skipped)`: the usable examples, and for
each record left out the reason, by id. An image stays on disk until `load()`, which raises `DataError` naming the file
if it is missing or damaged. `check_disjoint` keeps the splits apart, and `split_by_image` makes them.
"""

import hashlib
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from hones_offline.data.records import is_text, naming, parse_json, read_file
from hones_offline.data.scenes import Scene
from hones_steer.errors import DataError

Box = tuple[float, float, float, float]
"""A region of an image in pixels: left, top, width, height."""

MAX_REFERENCES = 5

# COCO's releases of 2014 and 2017 put the same photographs into different splits; the number identifies a photograph.
_COCO_FILE = re.compile(r"(?:.*/)?(?:COCO_\w+_|(?:train|val|test|unlabeled)20(?:14|15|17)/)(\d{12})\.jpg")

# Errors that Pillow raises on files that are missing, absurdly large, cut short or damaged. Its decoders trust what
# they read, so that damage can raise almost anything (flipping bytes in image files raised each of these).
_UNREADABLE = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error),
    Image.DecompressionBombError,
)


class ImageSource(Protocol):
    """The source of an example's image."""

    @property
    def key(self) -> str:
        """The image's identity: two sources with equal keys give the same picture."""
        ...

    def load(self) -> Image.Image:
        """The image as RGB; raises DataError, naming the file, if it cannot be read."""
        ...


@dataclass(frozen=True)
class FileImage:
    """An image file, turned upright by its EXIF data; a `box` is outlined in blue."""

    path: Path
    box: Box | None = None

    @property
    def key(self) -> str:
        """The file's absolute path with links resolved; the box does not matter."""
        return str(self.path.resolve())

    def load(self) -> Image.Image:
        """The image as RGB; raises DataError if the file is missing or damaged, or if the box lies outside it."""
        try:
            with Image.open(self.path) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
        except _UNREADABLE as error:
            raise DataError(f"Image '{self.path}' cannot be read: {error}") from error
        if self.box is not None:
            _draw_box(image, self.box, self.path)
        return image


@dataclass(frozen=True, eq=False)
class MemoryImage:
    """An image that is already in memory; `key` tells it from all others."""

    image: Image.Image
    key: str

    def load(self) -> Image.Image:
        """The image as RGB."""
        return self.image.convert("RGB")


def _draw_box(image: Image.Image, box: Box, path: Path) -> None:
    """Outline `box` in blue: just outside it, so that no letter is painted over, and clipped to the image."""
    left, top, width, height = box
    line = max(2, round(min(image.size) / 200))
    x0, x1 = (max(0, math.floor(left) - line), min(image.width, math.ceil(left + width) + line))
    y0, y1 = (max(0, math.floor(top) - line), min(image.height, math.ceil(top + height) + line))
    if x1 - x0 <= line or y1 - y0 <= line:
        raise DataError(f"Box {box} lies outside image '{path}' of {image.width}x{image.height} pixels.")
    ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), outline=(0, 0, 255), width=line)


@dataclass(frozen=True)
class Example:
    """One example of a task.

    `prompt` is the text that the task builds its prompt from: the question for vqa, nothing for ocr and caption.
    `targets` are the right answers: everybody's answers for vqa, the text for ocr, the references for a caption,
    ("Yes",) for retrieval. `candidates` are retrieval's captions: the image's own first, then the negatives.

    Raises:
        DataError: there is no target, or a target is blank.
    """

    id: str
    prompt: str
    targets: tuple[str, ...]
    image: ImageSource | None
    candidates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.targets or not all(target.strip() for target in self.targets):
            raise DataError(f"Example '{self.id}' has no targets or a blank one; every target needs text.")


class Loaded(NamedTuple):
    """The usable examples of a file, in the file's order, and for each record left out the reason, by id."""

    examples: list[Example]
    skipped: dict[str, str]


def require_examples(loaded: Loaded, path: Path) -> Loaded:
    """Return `loaded`; raises DataError, with the first reason, if no example of the file is usable."""
    if not loaded.examples:
        reason = next(iter(loaded.skipped.values()), "it is empty")
        raise DataError(f"{path} has no usable example: {len(loaded.skipped)} skipped; first reason: {reason}.")
    return loaded


# -------------------------------------------------------------------------------------------------- JSONL


def load_jsonl(path: str | Path) -> Loaded:
    """Read the examples of a user's own task: one JSON object per line.

        {"image": "cat.jpg", "prompt": "Which animal is this?", "targets": ["cat", "a cat"], "id": "17"}

    `image` is relative to the file's folder, and absent or null for an example without an image. `id` defaults to the
    line number. Other keys and blank lines are ignored. No line is skipped.

    Raises:
        DataError: the file cannot be read, or a line is no example; the message names file and line.
    """
    path = Path(path)
    examples: list[Example] = []
    ids: set[str] = set()
    for number, line in enumerate(read_file(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        with naming(f"{path}, line {number}"):
            example = _jsonl_example(line, path.parent, default_id=str(number))
            if example.id in ids:
                raise DataError(f"id '{example.id}' was used before; give each line its own.")
        ids.add(example.id)
        examples.append(example)
    return require_examples(Loaded(examples, {}), path)


def _jsonl_example(line: bytes, folder: Path, default_id: str) -> Example:
    record = parse_json(line)
    if not isinstance(record, dict):
        raise DataError("not a JSON object; write one {...} per line.")
    prompt, targets, image = record.get("prompt"), record.get("targets"), record.get("image")
    name = record.get("id", default_id)
    if not is_text(prompt):
        raise DataError('"prompt" must be a non-blank text.')
    if not isinstance(targets, list) or not targets or not all(map(is_text, targets)):
        raise DataError('"targets" must be a list of at least one non-blank text.')
    if image is not None and not is_text(image):
        raise DataError('"image" must be a file name; leave it out for an example without image.')
    if isinstance(name, bool) or not (isinstance(name, int) or is_text(name)):
        raise DataError('"id" must be a text or a whole number.')
    return Example(str(name), prompt, tuple(targets), None if image is None else FileImage(folder / image))


# ------------------------------------------------------------------------------------------------ scenes


def scene_examples(task: str, scenes: Sequence[Scene], negatives: int = 9) -> list[Example]:
    """Make an example of one of the four tasks from each generated scene.

    For retrieval each example has `negatives` false captions. Ids and image keys are digests of what a scene shows, so
    that a scene has the same ones in every list.

    Raises:
        DataError: the task is none of the four.
    """
    return [_scene_example(task, scene, negatives) for scene in scenes]


def _scene_example(task: str, scene: Scene, negatives: int) -> Example:
    name = f"scene-{_digest(scene)}"
    image = MemoryImage(scene.image(), f"scene-{_digest((scene.cells, scene.text))}")
    match task:
        case "vqa":
            return Example(name, scene.question, (scene.answer,), image)
        case "ocr":
            return Example(name, "", (scene.transcription,), image)
        case "caption":
            return Example(name, "", scene.captions[:MAX_REFERENCES], image)
        case "retrieval":
            return Example(name, "", ("Yes",), image, scene.candidates(negatives))
        case _:
            raise DataError(f"Scenes have no task '{task}'; choose vqa, ocr, caption or retrieval.")


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------- splits


def check_disjoint(**splits: Sequence[Example]) -> None:
    """Check that no image is in two splits, and no example without an image.

    Two images are the same if their keys are equal or, in files named as COCO names them, if COCO's numbers are; two
    examples without one are if all that they ask and answer is.

    Raises:
        DataError: two splits share an image or an example; the message names it and the splits.
    """
    seen: dict[str, tuple[str, str]] = {}
    texts: dict[str, str] = {}
    for split, examples in splits.items():
        for example in (example for example in examples if example.image is None):
            if (other := texts.setdefault(fingerprint(example), split)) != split:
                raise DataError(
                    f"Splits '{other}' and '{split}' share example '{example.id}'; "
                    "each example may be in one split only."
                )
        for key in [example.image.key for example in examples if example.image is not None]:
            first_split, first_key = seen.setdefault(_identity(key), (split, key))
            if first_split != split:
                also = "" if key == first_key else f", which is '{first_key}' in the other"
                raise DataError(
                    f"Splits '{first_split}' and '{split}' share image '{key}'{also}; "
                    "each image may be in one split only."
                )


def split_by_image(
    examples: Sequence[Example], shares: Mapping[str, float], seed: int
) -> tuple[list[Example], dict[str, list[Example]]]:
    """Draw splits that share no image with one another nor with the rest, told apart as in `check_disjoint`.

    Images are drawn at random, each with all its examples, until a split has its share of them; so it can have a few
    more. Within a split the examples keep their order. `shares` maps each split's name to its share of all examples.

    Returns:
        The rest, and the splits by name.

    Raises:
        DataError: there are too few images.
    """
    images = [fingerprint(e) if e.image is None else _identity(e.image.key) for e in examples]
    sizes = Counter(images)
    left = [list(sizes)[i] for i in np.random.default_rng(seed).permutation(len(sizes))]
    split_of: dict[str, str] = {}
    for split, share in shares.items():
        wanted = round(share * len(examples))
        while wanted > 0 and left:
            image = left.pop()
            split_of[image] = split
            wanted -= sizes[image]
    if not left:
        raise DataError(
            f"{len(examples)} examples with {len(sizes)} images cannot be divided into {len(shares) + 1} splits that "
            "share none; give more images, or the splits as files"
        )
    parts: dict[str, list[Example]] = {split: [] for split in ("", *shares)}
    for example, image in zip(examples, images, strict=True):
        parts[split_of.get(image, "")].append(example)
    return parts.pop(""), parts


def fingerprint(example: Example) -> str:
    """12 hex digits that two examples share if all that they ask and answer is the same; ids may differ."""
    image = example.image and [_identity(example.image.key), getattr(example.image, "box", None)]
    content = [example.prompt, example.targets, example.candidates, image]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _identity(key: str) -> str:
    """The image's number in COCO, if its file is named as COCO names them; else its key."""
    coco = _COCO_FILE.fullmatch(key)
    return f"COCO {coco[1]}" if coco else key
