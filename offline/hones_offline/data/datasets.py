"""Published datasets, read from their files as released.

    the paper's COCO-format splits   load_coco            vqa, ocr, caption, retrieval
    COCO captions                    load_coco_captions   caption, retrieval
    VQA v2                           load_vqa             vqa
    TextVQA                          load_textvqa         vqa
    GQA                              load_gqa             vqa
    Flickr30k                        load_flickr30k       caption, retrieval
    any of them, told by content     load_dataset

In the paper's files and in TextVQA, a record that lacks something is skipped, and the reason is kept. The other files
are complete as released: there a record is skipped only if a text is blank or if GQA leaves it out of its balanced set,
and anything else that is wrong raises `DataError`, naming file and record. Retrieval's negatives: `negatives.py`.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hones_offline.data.examples import MAX_REFERENCES, Box, Example, FileImage, Loaded, require_examples
from hones_offline.data.negatives import with_hard_negatives
from hones_offline.data.records import (
    Record,
    UnusableError,
    is_text,
    naming,
    parse_json,
    read_csv,
    read_json,
    records_by_id,
    require_number,
    require_part,
    require_text,
    require_texts,
)
from hones_steer.errors import DataError

_MAX_PIXELS = 1_000_000
_CAPTION_TASKS = ("caption", "retrieval")
_FLICKR30K_COLUMNS = ("raw", "split", "filename", "img_id")


def load_dataset(
    path: str | Path,
    task: str,
    image_root: str | Path,
    *,
    seed: int,
    negatives: int = 49,
    limit: int | None = None,
) -> Loaded:
    """Read any of the files below for one of its tasks; the content decides which file it is.

    For VQA v2 `path` is the question file; the annotations are looked for beside it, under their released name. For
    Flickr30k the split follows a colon: "flickr_annotations_30k.csv:test". `limit` keeps the first so many examples.

    Raises:
        DataError: the file is none of these, or its loader refuses it.
    """
    path, root = Path(path), Path(image_root)
    csv_file = re.fullmatch(r"(.+\.csv)(?::(.*))?", str(path), re.DOTALL)
    if csv_file:
        loaded = _flickr30k(Path(csv_file[1]), task, root, csv_file[2])
    else:
        loaded = _from_json(read_json(path), path, task, root)
    return _completed(loaded, task, seed, negatives, limit)


def _from_json(content: object, path: Path, task: str, root: Path) -> Loaded:
    """Read parsed JSON; retrieval's examples have all captions of their image as candidates, for `_completed`."""
    match content:
        case {"questions": _}:
            _check_task(task, "A VQA question file", ("vqa",))
            annotations = _annotations_beside(path)
            return _vqa(content, path, read_json(annotations), annotations, root)
        case {"images": _, "annotations": _}:
            return _coco_captions(content, path, task, root)
        case {"annotations": _}:
            raise DataError(f"{path} has annotations alone; of VQA give the question file, of COCO captions_*.json.")
        case {"data": [{"question": _}, *_]} | [{"question": _}, *_]:
            _check_task(task, "A TextVQA file", ("vqa",))
            return _textvqa(content, path, root)
        case {"data": _} | [*_]:
            return _coco(content, path, task, root)
        case dict() if any(isinstance(record, dict) and "imageId" in record for record in content.values()):
            _check_task(task, "A GQA question file", ("vqa",))
            return _gqa(content, path, root)
    raise DataError(f"{path} is no file of the paper's, of COCO captions, VQA v2, TextVQA or GQA.")


def _check_task(task: str, what: str, tasks: Sequence[str]) -> None:
    if task not in tasks:
        raise DataError(f"{what} has no task '{task}'; choose one of {', '.join(tasks)}.")


def _completed(loaded: Loaded, task: str, seed: int, negatives: int, limit: int | None = None) -> Loaded:
    if task == "retrieval":
        return Loaded(with_hard_negatives(loaded.examples, negatives, seed, limit=limit), loaded.skipped)
    return Loaded(loaded.examples[:limit], loaded.skipped)


# ----------------------------------------------------------------------------------------- the paper's COCO


def load_coco(path: str | Path, task: str, image_root: str | Path, *, seed: int, negatives: int = 49) -> Loaded:
    """Read the paper's COCO-format file for one of its tasks (vqa, ocr, caption, retrieval).

    A record has `image_info.file_name` and, per task, `vqa.question` with `all_answers` (or `answer`),
    `ocr.bbox` with `text`, `captions[].caption`, `retrieval[].caption`. Records that lack their task's part
    are skipped, with the reason. Images lie in `image_root` or, as COCO unpacks them, in
    `image_root/train2014` and the like. `with_hard_negatives` chooses retrieval's negatives among all captions
    of the file.

    Raises:
        DataError: the file is no such list, the task is unknown, no record is usable, or the file has too few
            images for that many negatives.
    """
    path = Path(path)
    return _completed(_coco(read_json(path), path, task, Path(image_root)), task, seed, negatives)


def _coco(content: object, path: Path, task: str, root: Path) -> Loaded:
    parts = {"vqa": _coco_vqa, "ocr": _coco_ocr, "caption": _coco_caption, "retrieval": _coco_retrieval}
    _check_task(task, "A COCO-format file", tuple(parts))
    return _usable(content, path, "image_id", lambda name, record: parts[task](name, record, root))


def _coco_vqa(name: str, record: Record, root: Path) -> Example:
    part = require_part(record, "vqa", dict)
    question = require_text(part.get("question"), "vqa.question")
    answers = require_texts(part.get("all_answers", [part.get("answer")]), "vqa.all_answers")
    return Example(name, question, tuple(answers), _image(record, root))


def _coco_ocr(name: str, record: Record, root: Path) -> Example:
    part = require_part(record, "ocr", dict)
    text = require_text(part.get("text"), "ocr.text")
    return Example(name, "", (text,), _image(record, root, _box(part.get("bbox"))))


def _coco_caption(name: str, record: Record, root: Path) -> Example:
    return _captioned(name, "caption", _captions(record, "captions"), _image(record, root))


def _coco_retrieval(name: str, record: Record, root: Path) -> Example:
    return _captioned(name, "retrieval", _captions(record, "retrieval"), _image(record, root))


def _captions(record: Record, field: str) -> list[str]:
    return require_texts(_each(record, field, "caption"), f"{field}[].caption")


def _each(record: Record, field: str, key: str) -> list[object]:
    """The value of `key` in each object of the list `field`."""
    items = require_part(record, field, list)
    return [item.get(key) if isinstance(item, dict) else None for item in items]


def _captioned(name: str, task: str, captions: Sequence[str], image: FileImage) -> Example:
    if task == "retrieval":
        return Example(name, "", ("Yes",), image, tuple(captions))
    return Example(name, "", tuple(captions[:MAX_REFERENCES]), image)


def _image(record: Record, root: Path, box: Box | None = None) -> FileImage:
    name = require_text(require_part(record, "image_info", dict).get("file_name"), "image_info.file_name")
    return FileImage(_coco_path(name, root), box)


def _coco_path(name: str, root: Path, url: object = None) -> Path:
    """Path of the image of that name: in `root`, or in the folder that COCO unpacks it into."""
    split = re.match(r"COCO_(\w+?)_\d", name) or re.search(r"/(\w+)/[^/]+$", str(url))
    if split and not _exists(root / name) and _exists(root / split[1] / name):
        return root / split[1] / name
    return root / name


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long
        return False


def _box(value: object) -> Box:
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 4 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise DataError("ocr.bbox is not [x, y, width, height]")
    if not all(abs(n) < _MAX_PIXELS for n in numbers) or min(numbers[2:]) <= 0:
        raise DataError("ocr.bbox is empty or absurdly large")
    left, top, width, height = (float(n) for n in numbers)
    return left, top, width, height


# ------------------------------------------------------------------------------------------------ TextVQA


def load_textvqa(path: str | Path, image_root: str | Path) -> Loaded:
    """Read a TextVQA annotation file (`question`, `answers`, `image_id`) as examples of the vqa task.

    Images are `image_root/{image_id}.jpg`.

    Raises:
        DataError: the file is no such list, or no record is usable.
    """
    path = Path(path)
    return _textvqa(read_json(path), path, Path(image_root))


def _textvqa(content: object, path: Path, root: Path) -> Loaded:
    def example(name: str, record: Record) -> Example:
        question = require_text(record.get("question"), "question")
        answers = require_texts(record.get("answers"), "answers")
        image = require_text(record.get("image_id"), "image_id")
        return Example(name, question, tuple(answers), FileImage(root / f"{image}.jpg"))

    return _usable(content, path, "question_id", example)


def _usable(content: object, path: Path, id_field: str, build: Callable[[str, Record], Example]) -> Loaded:
    """Build an example from every record of the list; records for which `build` raises DataError are skipped."""
    records = content.get("data") if isinstance(content, dict) else content
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f'{path}: not a list of records, nor {{"data": [...]}} with one.')
    examples: list[Example] = []
    skipped: dict[str, str] = {}
    uses: Counter[str] = Counter()
    for position, record in enumerate(records):
        name = str(record.get(id_field, f"record {position}"))
        uses[name] += 1
        if uses[name] > 1:
            name = f"{name}-{uses[name]}"
        try:
            examples.append(build(name, record))
        except DataError as error:
            skipped[name] = str(error)
    return require_examples(Loaded(examples, skipped), path)


# ------------------------------------------------------------------------------------------ COCO captions


def load_coco_captions(
    path: str | Path, task: str, image_root: str | Path, *, seed: int, negatives: int = 49
) -> Loaded:
    """Read COCO's captions_train2014.json, captions_val2017.json and the like for caption or retrieval.

    {"images": [{"id", "file_name", ...}], "annotations": [{"id", "image_id", "caption"}]} gives one example per image,
    whose id is the image's number. Images lie in `image_root` or, as COCO unpacks them, in `image_root/val2014` and the
    like. An image without captions or with a blank one is skipped.

    Raises:
        DataError: anything else is wrong with the file.
    """
    path = Path(path)
    return _completed(_coco_captions(read_json(path), path, task, Path(image_root)), task, seed, negatives)


def _coco_captions(content: object, path: Path, task: str, root: Path) -> Loaded:
    _check_task(task, "A COCO captions file", _CAPTION_TASKS)
    images = records_by_id(content, path, "image", "id")
    captions: dict[int, list[str]] = {number: [] for number in images}
    for number, annotation in records_by_id(content, path, "annotation", "id").items():
        image, caption = annotation.get("image_id"), annotation.get("caption")
        if type(image) is not int or image not in captions:
            raise DataError(f"{path}, annotation {number}: image_id {image!r} is none of the file's images.")
        if not isinstance(caption, str):
            raise DataError(f"{path}, annotation {number}: no text in caption; give one of COCO's captions_*.json.")
        captions[image].append(caption)

    def example(name: str, info: Record) -> Example:
        of_image = require_texts(captions[info["id"]], "captions")
        file = _coco_path(require_text(info.get("file_name"), "file_name"), root, info.get("coco_url"))
        return _captioned(name, task, of_image, FileImage(file))

    return _examples(images, path, "image", example)


# ------------------------------------------------------------------------------------------------- VQA v2


def load_vqa(questions: str | Path, annotations: str | Path, image_root: str | Path) -> Loaded:
    """Read a question file of VQA v2 with its annotation file as examples of the vqa task.

    For example v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json. Every question needs
    an annotation for the same image; annotations of other questions are ignored. Images are
    `COCO_{data_subtype}_{image_id}.jpg` in `image_root` or, as COCO unpacks them, in `image_root/val2014` and the like.
    A question that is blank or has a blank answer is skipped.

    Raises:
        DataError: anything else is wrong with the files.
    """
    questions, annotations = Path(questions), Path(annotations)
    return _vqa(read_json(questions), questions, read_json(annotations), annotations, Path(image_root))


def _annotations_beside(questions: Path) -> Path:
    path = questions.with_name(questions.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    if path != questions and path.exists():
        return path
    lack = path.name if path != questions else "its annotations"
    raise DataError(
        f"{questions} needs {lack} beside it, named as released: "
        "v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json."
    )


def _vqa(content: Any, path: Path, annotations: object, annotations_path: Path, root: Path) -> Loaded:
    questions = records_by_id(content, path, "question", "question_id")
    answers = records_by_id(annotations, annotations_path, "annotation", "question_id")
    kind, split = content.get("data_type"), content.get("data_subtype")
    if kind != "mscoco" or not is_text(split):
        raise DataError(
            f'{path}: "data_type" is {kind!r} and "data_subtype" {split!r}; questions about COCO images have '
            '"mscoco" and, for example, "val2014".'
        )

    def example(name: str, record: Record) -> Example:
        image = require_number(record.get("image_id"), "image_id")
        annotation = answers.get(record["question_id"], {})
        if annotation.get("image_id") != image:
            raise DataError(f"{annotations_path} has no answers to it, or of another image; give the one of this split")
        question = require_text(record.get("question"), "question")
        with naming(annotations_path):
            targets = require_texts(_each(annotation, "answers", "answer"), "answers[].answer")
        file = _coco_path(f"COCO_{split}_{image:012}.jpg", root)
        return Example(name, question, tuple(targets), FileImage(file))

    return _examples(questions, path, "question", example)


# ---------------------------------------------------------------------------------------------------- GQA


def load_gqa(path: str | Path, image_root: str | Path) -> Loaded:
    """Read a GQA question file (val_balanced_questions.json and the like) as examples of the vqa task.

    The file is {"07333408": {"imageId", "question", "answer", "isBalanced", ...}, ...}; images are
    `image_root/{imageId}.jpg`. Questions outside the balanced set, which GQA's own score leaves out, and blank ones are
    skipped.

    Raises:
        DataError: anything else is wrong with the file, as with the test and challenge files, which have no answers.
    """
    path = Path(path)
    return _gqa(read_json(path), path, Path(image_root))


def _gqa(content: object, path: Path, root: Path) -> Loaded:
    if not isinstance(content, dict):
        raise DataError(f'{path}: not an object of questions by id, {{"07333408": {{...}}, ...}}.')

    def example(name: str, record: object) -> Example:
        if not isinstance(record, dict):
            raise DataError("not an object")
        question = require_text(record.get("question"), "question")
        answer = require_text(record.get("answer"), "answer")
        image = require_text(record.get("imageId"), "imageId")
        balanced = record.get("isBalanced")
        if not isinstance(balanced, bool):
            raise DataError("no true or false in isBalanced")
        if not balanced:
            raise UnusableError("not in GQA's balanced set")
        return Example(name, question, (answer,), FileImage(root / f"{image}.jpg"))

    return _examples(content, path, "question", example)


# ---------------------------------------------------------------------------------------------- Flickr30k


def load_flickr30k(
    path: str | Path, task: str, image_root: str | Path, *, split: str, seed: int, negatives: int = 49
) -> Loaded:
    """Read one split of flickr_annotations_30k.csv for caption or retrieval.

    Its columns are `raw` (a JSON list of captions), `sentids`, `split` (train, val, test), `filename`, `img_id`.
    Images are `image_root/{filename}`. An image with a blank caption is skipped.

    Raises:
        DataError: anything else is wrong with the file, such as an image that is in two splits.
    """
    return _completed(_flickr30k(Path(path), task, Path(image_root), split), task, seed, negatives)


def _flickr30k(path: Path, task: str, root: Path, split: str | None) -> Loaded:
    _check_task(task, "The Flickr30k file", _CAPTION_TASKS)
    rows = _flickr30k_rows(path)
    splits = list(dict.fromkeys(row["split"] for row in rows.values()))
    if split not in splits:
        lack = "several splits" if split is None else f"no split '{split}'"
        raise DataError(f"{path} has {lack}; name one of {', '.join(splits)}, as in {path}:{splits[-1]}.")

    def example(name: str, row: Record) -> Example:
        captions = require_texts(parse_json(row["raw"].encode()), "raw")
        return _captioned(name, task, captions, FileImage(root / row["filename"]))

    of_split = {name: row for name, row in rows.items() if row["split"] == split}
    return _examples(of_split, path, "img_id", example)


def _flickr30k_rows(path: Path) -> dict[str, dict[str, str]]:
    """The file's rows by img_id; raises DataError if an image occurs twice."""
    rows: dict[str, dict[str, str]] = {}
    splits: dict[str, str] = {}
    for number, row in enumerate(read_csv(path, _FLICKR30K_COLUMNS), start=1):
        name, image, split = row["img_id"], row["filename"], row["split"]
        if not all(map(is_text, (name, image, split))):
            raise DataError(f"{path}, row {number}: img_id, filename or split is blank.")
        if splits.get(image, split) != split:
            raise DataError(
                f"{path}: splits '{splits[image]}' and '{split}' share image '{image}'; "
                "each image may be in one split only."
            )
        if image in splits or name in rows:
            raise DataError(f"{path}, row {number}: img_id {name} or image '{image}' was used before.")
        rows[name], splits[image] = row, split
    return rows


# ------------------------------------------------------------------------------------- complete files


def _examples(records: Mapping[Any, Any], path: Path, kind: str, build: Callable[[str, Any], Example]) -> Loaded:
    """Build an example from every record; records for which `build` raises UnusableError are skipped."""
    examples: list[Example] = []
    skipped: dict[str, str] = {}
    for name, record in records.items():
        try:
            with naming(f"{path}, {kind} {name}"):
                examples.append(build(str(name), record))
        except UnusableError as reason:
            skipped[str(name)] = str(reason)
    return require_examples(Loaded(examples, skipped), path)
