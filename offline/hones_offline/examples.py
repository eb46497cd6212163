"""Examples of a task: an image, a prompt and targets, read from files and kept apart by image.

Every loader gives `Loaded(examples, skipped)`: what was usable, and for the rest why not, by id.
Images stay on disk until `load()`; a missing or broken one is a `DataError` then, naming the file.
"""

import hashlib
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps

from hones_offline.metrics import caption_tokens
from hones_offline.scenes import Scene
from hones_steer.errors import DataError

Box = tuple[float, float, float, float]
"""A region of an image in pixels: left, top, width, height."""

Words = tuple[str, ...]
"""A caption's words (`caption_tokens`); captions of equal words count as the same."""

MAX_REFERENCES = 5

_MAX_PIXELS = 1_000_000
# Neither file systems nor tokenizers take these, though JSON does.
_IMPOSSIBLE = re.compile("[\0\ud800-\udfff]")

# What Pillow raises on files that are missing, absurdly large, cut short or damaged. Its decoders trust what
# they read, so damage shows as almost anything (these were found by flipping bytes).
_UNREADABLE = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error),
    Image.DecompressionBombError,
)


class ImageSource(Protocol):
    """Where an example's image comes from."""

    @property
    def key(self) -> str:
        """The image's identity: two sources with equal keys show the same picture."""
        ...

    def load(self) -> Image.Image:
        """The image, RGB. Raises DataError, naming the file, if it can't be read."""
        ...


@dataclass(frozen=True)
class FileImage:
    """An image file, upright as its EXIF data says; with `box` that region is outlined in blue."""

    path: Path
    box: Box | None = None

    @property
    def key(self) -> str:
        """The file's absolute path with links resolved; the box does not matter."""
        return str(self.path.resolve())

    def load(self) -> Image.Image:
        """Read the file as RGB; raises DataError if it is missing or damaged, or the box lies outside."""
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
    """An image already in memory, under a name that tells it from others."""

    image: Image.Image
    key: str

    def load(self) -> Image.Image:
        """The image as RGB."""
        return self.image.convert("RGB")


def _draw_box(image: Image.Image, box: Box, path: Path) -> None:
    """Outline `box` in blue, just outside so that no letter is painted over, clipped to the image."""
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

    `prompt` is what the task makes its prompt of (the question for vqa, nothing for ocr and caption).
    `targets` are the right answers: all people's answers for vqa, the text for ocr, the references for a
    caption, ("Yes",) for retrieval. `candidates`: for retrieval the image's own caption, then the negatives.
    Raises DataError if there are no targets or a target is blank.
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
    """What a file gave: its usable examples in file order, and the reason for each record left out, by id."""

    examples: list[Example]
    skipped: dict[str, str]


# -------------------------------------------------------------------------------------------------- JSONL


def load_jsonl(path: str | Path) -> Loaded:
    """Read a user's own task: one JSON object per line.

        {"image": "cat.jpg", "prompt": "Which animal is this?", "targets": ["cat", "a cat"], "id": "17"}

    `image` is relative to the file's folder and absent (or null) for text alone; `id` defaults to the line
    number; other keys are ignored, blank lines too. Nothing is skipped: the first bad line raises DataError,
    naming file and line.
    """
    path = Path(path)
    examples: list[Example] = []
    ids: set[str] = set()
    for number, line in enumerate(_read(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            example = _jsonl_example(line, path.parent, default_id=str(number))
            if example.id in ids:
                raise DataError(f"id '{example.id}' was used before; give each line its own.")
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        ids.add(example.id)
        examples.append(example)
    return _require_some(Loaded(examples, {}), path)


def _jsonl_example(line: bytes, folder: Path, default_id: str) -> Example:
    record = _parse(line)
    if not isinstance(record, dict):
        raise DataError("not a JSON object; write one {...} per line.")
    prompt, targets, image = record.get("prompt"), record.get("targets"), record.get("image")
    name = record.get("id", default_id)
    if not _is_text(prompt):
        raise DataError('"prompt" must be a non-blank text.')
    if not isinstance(targets, list) or not targets or not all(map(_is_text, targets)):
        raise DataError('"targets" must be a list of at least one non-blank text.')
    if image is not None and not _is_text(image):
        raise DataError('"image" must be a file name; leave it out for an example without image.')
    if isinstance(name, bool) or not (isinstance(name, int) or _is_text(name)):
        raise DataError('"id" must be a text or a whole number.')
    return Example(str(name), prompt, tuple(targets), None if image is None else FileImage(folder / image))


# --------------------------------------------------------------------------------------------------- COCO


def load_coco(path: str | Path, task: str, image_root: str | Path, *, seed: int, negatives: int = 49) -> Loaded:
    """Read the paper's COCO-format file for one of its tasks (vqa, ocr, caption, retrieval).

    A record has `image_info.file_name` and, per task, `vqa.question` with `all_answers` (or `answer`),
    `ocr.bbox` with `text`, `captions[].caption`, `retrieval[].caption`. Records that lack their task's part
    are skipped, with the reason. Images lie in `image_root`, or as COCO unpacks them in
    `image_root/train2014` and the like.

    Retrieval: negatives are chosen by `with_hard_negatives` among all captions of the file.
    Raises DataError if the file is no such list, the task is unknown, nothing is usable, or the file has too
    few images for that many negatives.
    """
    path, root = Path(path), Path(image_root)
    parts = {"vqa": _coco_vqa, "ocr": _coco_ocr, "caption": _coco_caption, "retrieval": _coco_retrieval}
    if task not in parts:
        raise DataError(f"A COCO-format file has no task '{task}'; choose one of {', '.join(parts)}.")
    loaded = _load_records(path, "image_id", lambda name, record: parts[task](name, record, root))
    if task != "retrieval":
        return loaded
    return Loaded(with_hard_negatives(loaded.examples, negatives, seed), loaded.skipped)


def _coco_vqa(name: str, record: dict[str, Any], root: Path) -> Example:
    part = _part(record, "vqa", dict)
    question = _string(part.get("question"), "vqa.question")
    answers = _strings(part.get("all_answers", [part.get("answer")]), "vqa.all_answers")
    return Example(name, question, tuple(answers), _coco_image(record, root))


def _coco_ocr(name: str, record: dict[str, Any], root: Path) -> Example:
    part = _part(record, "ocr", dict)
    text = _string(part.get("text"), "ocr.text")
    return Example(name, "", (text,), _coco_image(record, root, _box(part.get("bbox"))))


def _coco_caption(name: str, record: dict[str, Any], root: Path) -> Example:
    captions = _captions(record, "captions")
    return Example(name, "", captions[:MAX_REFERENCES], _coco_image(record, root))


def _coco_retrieval(name: str, record: dict[str, Any], root: Path) -> Example:
    """The image with all of its own captions as candidates, for `with_hard_negatives` to complete."""
    return Example(name, "", ("Yes",), _coco_image(record, root), _captions(record, "retrieval"))


def _captions(record: dict[str, Any], field: str) -> tuple[str, ...]:
    items = _part(record, field, list)
    captions = [item.get("caption") if isinstance(item, dict) else None for item in items]
    return tuple(_strings(captions, f"{field}[].caption"))


def _coco_image(record: dict[str, Any], root: Path, box: Box | None = None) -> FileImage:
    name = _string(_part(record, "image_info", dict).get("file_name"), "image_info.file_name")
    split = re.match(r"COCO_(\w+?)_\d", name)
    if split and not (root / name).exists() and (root / split[1] / name).exists():
        return FileImage(root / split[1] / name, box)
    return FileImage(root / name, box)


# ------------------------------------------------------------------------------------------------ TextVQA


def load_textvqa(path: str | Path, image_root: str | Path) -> Loaded:
    """Read a TextVQA annotation file (`question`, `answers`, `image_id`) as examples of the vqa task.

    Images are `image_root/{image_id}.jpg`. Raises DataError if the file is no such list or nothing is usable.
    """
    root = Path(image_root)
    return _load_records(path, "question_id", lambda name, record: _textvqa(name, record, root))


def _textvqa(name: str, record: dict[str, Any], root: Path) -> Example:
    question = _string(record.get("question"), "question")
    answers = _strings(record.get("answers"), "answers")
    image = _string(record.get("image_id"), "image_id")
    return Example(name, question, tuple(answers), FileImage(root / f"{image}.jpg"))


# --------------------------------------------------------------------------------------- reading records


def _load_records(path: str | Path, id_field: str, build: Callable[[str, dict[str, Any]], Example]) -> Loaded:
    """Build an example of every record, skipping those for which `build` raises DataError."""
    path = Path(path)
    examples: list[Example] = []
    skipped: dict[str, str] = {}
    uses: Counter[str] = Counter()
    for position, record in enumerate(_records(path)):
        name = str(record.get(id_field, f"record {position}"))
        uses[name] += 1
        if uses[name] > 1:
            name = f"{name}-{uses[name]}"
        try:
            examples.append(build(name, record))
        except DataError as error:
            skipped[name] = str(error)
    return _require_some(Loaded(examples, skipped), path)


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        content = _parse(_read(path))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    records = content.get("data") if isinstance(content, dict) else content
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f'{path}: not a list of records, nor {{"data": [...]}} with one.')
    return records


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"Data file '{path}' cannot be read: {error.strerror}") from error


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error}).") from error


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip()) and not _IMPOSSIBLE.search(value)


def _require_some(loaded: Loaded, path: Path) -> Loaded:
    if not loaded.examples:
        reason = next(iter(loaded.skipped.values()), "it is empty")
        raise DataError(f"{path} has no usable example: {len(loaded.skipped)} skipped; first reason: {reason}.")
    return loaded


def _part(record: dict[str, Any], field: str, kind: type[Any]) -> Any:
    part = record.get(field)
    if not isinstance(part, kind) or not part:
        raise DataError(f"no {field}")
    return part


def _string(value: object, field: str) -> str:
    if not _is_text(value):
        raise DataError(f"no text in {field}")
    return value


def _strings(values: object, field: str) -> list[str]:
    if not isinstance(values, list) or not values:
        raise DataError(f"no text in {field}")
    return [_string(value, field) for value in values]


def _box(value: object) -> Box:
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 4 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise DataError("ocr.bbox is not [x, y, width, height]")
    if not all(abs(n) < _MAX_PIXELS for n in numbers) or min(numbers[2:]) <= 0:
        raise DataError("ocr.bbox is empty or absurdly large")
    left, top, width, height = (float(n) for n in numbers)
    return left, top, width, height


# ---------------------------------------------------------------------------------------- hard negatives


def with_hard_negatives(examples: Sequence[Example], negatives: int, seed: int) -> list[Example]:
    """Complete retrieval examples whose `candidates` are all of their image's own captions.

    One own caption, drawn by `seed`, stays as the positive; then come `negatives` captions of as many other
    images, the hardest first: those with the highest TF-IDF cosine to the positive, at most one per image,
    never one that reads like a caption of the image itself; `seed` breaks ties. Raises DataError if there are
    not enough other images.
    """
    if negatives < 1:
        raise DataError(f"Retrieval can't rank {negatives} hard negatives; ask for at least 1.")
    random = np.random.default_rng(seed)
    images = {key: number for number, key in enumerate(dict.fromkeys(_image_key(e) for e in examples))}
    owners = np.array([images[_image_key(e)] for e in examples for _ in e.candidates])
    pool = [caption for example in examples for caption in example.candidates]
    words = [tuple(caption_tokens(caption)) for caption in pool]
    similar = _TfidfIndex(words)
    tiebreak = random.permutation(len(pool))
    result = []
    start = 0
    for example in examples:
        positive = start + int(random.integers(len(example.candidates)))
        start += len(example.candidates)
        order = np.lexsort((tiebreak, -similar.cosines(positive)))
        chosen = _first_per_image(order, owners, words, int(owners[positive]), negatives)
        if len(chosen) < negatives:
            raise DataError(
                f"Example '{example.id}' has {len(chosen)} hard negatives among {len(images)} images, "
                f"{negatives} were asked for; ask for fewer negatives or give more images."
            )
        result.append(replace(example, candidates=(pool[positive], *(pool[i] for i in chosen))))
    return result


def _image_key(example: Example) -> str:
    return example.id if example.image is None else example.image.key


def _first_per_image(
    order: npt.NDArray[np.intp], owners: npt.NDArray[np.intp], words: Sequence[Words], own: int, count: int
) -> list[int]:
    """The first `count` captions in `order`: one per image, none of image `own`, no wording twice."""
    used_images = {own}
    used_words = {words[i] for i in np.flatnonzero(owners == own).tolist()}
    chosen: list[int] = []
    for index in map(int, order):
        if len(chosen) == count:
            break
        if owners[index] not in used_images and words[index] not in used_words:
            used_images.add(int(owners[index]))
            used_words.add(words[index])
            chosen.append(index)
    return chosen


class _TfidfIndex:
    """Cosine similarity between texts as TF-IDF vectors, by an inverted index."""

    def __init__(self, texts: Sequence[Words]) -> None:
        counts = [Counter(text) for text in texts]
        frequency = Counter(word for count in counts for word in count)
        self._vectors = [_unit_tfidf(count, frequency, len(texts)) for count in counts]
        postings: dict[str, list[tuple[int, float]]] = {}
        for number, vector in enumerate(self._vectors):
            for word, weight in vector.items():
                postings.setdefault(word, []).append((number, weight))
        self._postings = {
            word: (np.array([n for n, _ in entries]), np.array([w for _, w in entries]))
            for word, entries in postings.items()
        }

    def cosines(self, number: int) -> npt.NDArray[np.float64]:
        """Similarity of text `number` to every text, [num_texts]."""
        result = np.zeros(len(self._vectors))
        for word, weight in sorted(self._vectors[number].items()):
            numbers, weights = self._postings[word]
            result[numbers] += weight * weights
        return result


def _unit_tfidf(count: Counter[str], frequency: Counter[str], num_texts: int) -> dict[str, float]:
    vector = {w: n * (math.log((num_texts + 1) / (frequency[w] + 1)) + 1) for w, n in sorted(count.items())}
    norm = math.sqrt(sum(value * value for value in vector.values()))
    return {word: value / norm for word, value in vector.items()}


# ------------------------------------------------------------------------------------------------ scenes


def scene_examples(task: str, scenes: Sequence[Scene], negatives: int = 9) -> list[Example]:
    """Generated scenes as examples of one of the four tasks; retrieval with that many false captions.

    Ids and image keys come from what a scene shows, so the same scene has the same ones in every list.
    Raises DataError for an unknown task.
    """
    return [_scene_example(task, scene, negatives) for scene in scenes]


def _scene_example(task: str, scene: Scene, negatives: int) -> Example:
    name = f"scene-{_digest(scene)}"
    image = MemoryImage(scene.image(), f"scene-{_digest((scene.cells, scene.text))}")
    match task:
        case "vqa":
            return Example(name, scene.question, (scene.answer,), image)
        case "ocr":
            return Example(name, "", (scene.text,), image)
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
    """Raise DataError, naming image and splits, if two share an image. Texts alone are not compared."""
    seen: dict[str, str] = {}
    for split, examples in splits.items():
        for example in examples:
            if example.image is None:
                continue
            other = seen.setdefault(example.image.key, split)
            if other != split:
                raise DataError(
                    f"Splits '{other}' and '{split}' share image '{example.image.key}'; "
                    "each image may be in one split only."
                )
