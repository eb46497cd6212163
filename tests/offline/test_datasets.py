"""Published datasets give the content of their files; an error names the file and the record."""

import copy
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hones_offline.data.datasets import (
    load_coco,
    load_coco_captions,
    load_dataset,
    load_flickr30k,
    load_gqa,
    load_textvqa,
    load_vqa,
)
from hones_offline.data.examples import Example, FileImage, Loaded, check_disjoint
from PIL import Image

from hones_steer.errors import DataError

EXCERPT = Path(__file__).parent / "data" / "coco_excerpt.json"
RECORDS: list[dict[str, Any]] = json.loads(EXCERPT.read_text())["data"]
BLUE = (0, 0, 255)


def grey_image(path: Path, size: tuple[int, int] = (20, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (128, 128, 128)).save(path)
    return path


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def coco_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gray images of the sizes and under the names that the excerpt gives."""
    root = tmp_path_factory.mktemp("coco")
    for record in RECORDS:
        info = record["image_info"]
        grey_image(root / info["file_name"], (info["width"], info["height"]))
    return root


# --------------------------------------------------------------------------------------------------- COCO


def load(task: str, root: Path, seed: int = 0, negatives: int = 5) -> Loaded:
    return load_coco(EXCERPT, task, root, seed=seed, negatives=negatives)


def test_coco_vqa_has_questions_and_all_ten_answers(coco_images: Path) -> None:
    examples, skipped = load("vqa", coco_images)
    assert skipped == {}
    assert [e.prompt for e in examples] == [r["vqa"]["question"] for r in RECORDS]
    assert [list(e.targets) for e in examples] == [r["vqa"]["all_answers"] for r in RECORDS]


def test_coco_ocr_has_the_text_and_a_box_around_it(coco_images: Path) -> None:
    examples, skipped = load("ocr", coco_images)
    assert list(skipped) == ["491229"]
    assert "text" in skipped["491229"]
    texts = {str(r["image_id"]): r["ocr"]["text"] for r in RECORDS}
    assert {e.id: e.targets for e in examples} == {i: (t,) for i, t in texts.items() if t.strip()}
    for example in examples:
        assert example.image is not None
        assert (np.asarray(example.image.load()) == BLUE).all(axis=-1).any()


def test_coco_captions_are_at_most_five(coco_images: Path) -> None:
    examples, skipped = load("caption", coco_images)
    assert skipped == {}
    assert Counter(len(e.targets) for e in examples) == {5: 10}
    assert examples[0].targets[0] == RECORDS[0]["captions"][0]["caption"]


def test_every_coco_image_is_found_and_has_its_size(coco_images: Path) -> None:
    for example, record in zip(load("caption", coco_images).examples, RECORDS, strict=True):
        assert example.image is not None
        assert example.image.load().size == (record["image_info"]["width"], record["image_info"]["height"])


def test_coco_images_are_found_where_coco_unpacks_them(tmp_path: Path) -> None:
    name = RECORDS[0]["image_info"]["file_name"]
    grey_image(tmp_path / "train2014" / name)
    image = load("vqa", tmp_path).examples[0].image
    assert isinstance(image, FileImage)
    assert image.path == tmp_path / "train2014" / name


def test_the_same_image_has_one_key_in_every_task(coco_images: Path) -> None:
    vqa, ocr = load("vqa", coco_images).examples[1], load("ocr", coco_images).examples[0]
    assert vqa.id == ocr.id
    assert vqa.image is not None
    assert ocr.image is not None
    assert vqa.image.key == ocr.image.key


@pytest.mark.parametrize(
    ("field", "value", "task"),
    [
        ("vqa", None, "vqa"),
        ("vqa", {"question": "What?"}, "vqa"),
        ("vqa", {"question": "What?", "all_answers": []}, "vqa"),
        ("vqa", {"question": 3, "all_answers": ["cat"]}, "vqa"),
        ("ocr", {"text": "STOP"}, "ocr"),
        ("ocr", {"text": "STOP", "bbox": [1, 2, 3]}, "ocr"),
        ("ocr", {"text": "STOP", "bbox": [1, 2, 3, 0]}, "ocr"),
        ("ocr", {"text": "STOP", "bbox": [1, 2, float("nan"), 4]}, "ocr"),
        ("ocr", {"text": "STOP", "bbox": [1, 2, 10**400, 4]}, "ocr"),
        ("captions", [], "caption"),
        ("captions", ["a cat"], "caption"),
        ("captions", [{"caption": " "}], "caption"),
        ("image_info", {}, "caption"),
    ],
)
def test_a_record_without_the_tasks_part_is_skipped_with_its_reason(
    tmp_path: Path, field: str, value: object, task: str
) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"data": [*RECORDS[1:3], {**RECORDS[3], field: value}]}))
    examples, skipped = load_coco(path, task, tmp_path, seed=0)
    assert [e.id for e in examples] == [str(r["image_id"]) for r in RECORDS[1:3]]
    assert list(skipped) == [str(RECORDS[3]["image_id"])]
    assert field in skipped[str(RECORDS[3]["image_id"])]


def test_two_records_of_one_image_keep_ids_apart(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps([RECORDS[1], RECORDS[1]]))  # a bare list will do as well
    examples, _ = load_coco(path, "vqa", tmp_path, seed=0)
    assert [e.id for e in examples] == ["101094", "101094-2"]


@pytest.mark.parametrize("content", ["", "{", "3", '{"data": {}}', "[1]", "{}"])
def test_a_file_that_is_no_list_of_records_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(DataError, match=r"bad\.json"):
        load_coco(tmp_path / "bad.json", "vqa", tmp_path, seed=0)


def test_a_file_without_a_usable_record_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps([{"image_id": 1}, {"image_id": 2}]))
    with pytest.raises(DataError, match="2 skipped; first reason: no vqa"):
        load_coco(tmp_path / "bad.json", "vqa", tmp_path, seed=0)


def test_an_unknown_coco_task_is_an_error_that_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'count'.*vqa, ocr, caption, retrieval"):
        load("count", tmp_path)


# ------------------------------------------------------------------------------------------------ TextVQA

TEXTVQA = {
    "dataset_type": "val",
    "dataset_name": "textvqa",
    "dataset_version": "0.5.1",
    "data": [
        {
            "question": "what brand?",
            "image_id": "003a",
            "image_classes": ["Camera"],
            "flickr_original_url": "https://example.org/o.jpg",
            "flickr_300k_url": "https://example.org/o.jpg",
            "image_width": 1024,
            "image_height": 664,
            "answers": ["dakota"] * 10,
            "question_tokens": ["what", "brand"],
            "question_id": 34602,
            "set_name": "val",
        },
        {"question_id": 7},
    ],
}


def test_textvqa_is_read_as_vqa(tmp_path: Path) -> None:
    path = write_json(tmp_path / "TextVQA_0.5.1_val.json", TEXTVQA)
    (example,), skipped = load_textvqa(path, tmp_path)
    assert example == Example("34602", "what brand?", ("dakota",) * 10, FileImage(tmp_path / "003a.jpg"))
    assert skipped == {"7": "no text in question"}


# ------------------------------------------------------------------------------------------ COCO captions


def coco_image(number: int, split: str = "val2014") -> dict[str, Any]:
    name = f"{number:012}.jpg" if split.endswith("17") else f"COCO_{split}_{number:012}.jpg"
    return {
        "license": 3,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/{split}/{name}",
        "height": 360,
        "width": 640,
        "date_captured": "2013-11-14 11:18:45",
        "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
        "id": number,
    }


def coco_captions(split: str = "val2014") -> dict[str, Any]:
    """Images 391895, 522418 and 184613: six captions, two, none, in mixed order as COCO has them."""
    texts = [(391895, "A man on a motorcycle."), (522418, "A woman cutting a cake."), (391895, "a second ")]
    texts += [(391895, f"caption {i}") for i in range(4)] + [(522418, "A woman with a knife")]
    return {
        "info": {"description": "COCO 2014 Dataset", "year": 2014},
        "images": [coco_image(number, split) for number in (391895, 522418, 184613)],
        "licenses": [{"url": "http://example.org/by-nc-sa", "id": 3, "name": "BY-NC-SA"}],
        "annotations": [
            {"image_id": image, "id": 37 + i, "caption": caption} for i, (image, caption) in enumerate(texts)
        ],
    }


def test_coco_captions_are_grouped_by_image(tmp_path: Path) -> None:
    path = write_json(tmp_path / "captions_val2014.json", coco_captions())
    (man, woman), skipped = load_coco_captions(path, "caption", tmp_path, seed=0)
    file = FileImage(tmp_path / "COCO_val2014_000000391895.jpg")
    assert man == Example(
        "391895", "", ("A man on a motorcycle.", "a second ", "caption 0", "caption 1", "caption 2"), file
    )
    assert (woman.id, woman.targets) == ("522418", ("A woman cutting a cake.", "A woman with a knife"))
    assert skipped == {"184613": "no text in captions"}


def test_coco_captions_for_retrieval_take_their_negatives_from_the_file(tmp_path: Path) -> None:
    path = write_json(tmp_path / "captions_val2014.json", coco_captions())
    man, woman = load_coco_captions(path, "retrieval", tmp_path, seed=0, negatives=1).examples
    assert man.targets == woman.targets == ("Yes",)
    of_woman = {"A woman cutting a cake.", "A woman with a knife"}
    assert set(woman.candidates) & of_woman
    assert set(man.candidates) & of_woman
    assert len(woman.candidates) == len(man.candidates) == 2


@pytest.mark.parametrize("split", ["val2014", "train2017"])
def test_coco_caption_images_are_found_where_coco_unpacks_them(tmp_path: Path, split: str) -> None:
    path = write_json(tmp_path / f"captions_{split}.json", coco_captions(split))
    name = coco_image(391895, split)["file_name"]
    grey_image(tmp_path / split / name)
    image = load_coco_captions(path, "caption", tmp_path, seed=0).examples[0].image
    assert image == FileImage(tmp_path / split / name)
    image = load_coco_captions(path, "caption", tmp_path / split, seed=0).examples[0].image
    assert image == FileImage(tmp_path / split / name)


# ------------------------------------------------------------------------------------------------- VQA v2

QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


def vqa_questions() -> dict[str, Any]:
    return {
        "info": {"description": "This is v2.0 of the VQA dataset.", "version": "2.0"},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": {"name": "CC BY 4.0"},
        "data_subtype": "val2014",
        "questions": [
            {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
            {"image_id": 262148, "question": "What are the people doing?", "question_id": 262148001},
            {"image_id": 393225, "question": "What is the soup?", "question_id": 393225000},
        ],
    }


def vqa_annotations() -> dict[str, Any]:
    """Annotations in another order than the questions."""
    said = {393225000: "tomato", 262148000: "down", 262148001: "skating"}
    return {
        "info": {"version": "2.0"},
        "license": {"name": "CC BY 4.0"},
        "data_subtype": "val2014",
        "annotations": [
            {
                "question_type": "what",
                "multiple_choice_answer": answer,
                "answers": [
                    {"answer": answer if i < 7 else f"{answer} {i}", "answer_confidence": "yes", "answer_id": i + 1}
                    for i in range(10)
                ],
                "image_id": question // 1000,
                "answer_type": "other",
                "question_id": question,
            }
            for question, answer in said.items()
        ],
        "data_type": "mscoco",
    }


def vqa_files(folder: Path) -> tuple[Path, Path]:
    return write_json(folder / QUESTIONS, vqa_questions()), write_json(folder / ANNOTATIONS, vqa_annotations())


def test_vqa_has_every_question_with_all_ten_answers(tmp_path: Path) -> None:
    grey_image(tmp_path / "val2014" / "COCO_val2014_000000393225.jpg")
    (looking, doing, soup), skipped = load_vqa(*vqa_files(tmp_path), tmp_path)
    assert looking == Example(
        "262148000",
        "Where is he looking?",
        ("down",) * 7 + ("down 7", "down 8", "down 9"),
        FileImage(tmp_path / "COCO_val2014_000000262148.jpg"),
    )
    assert (doing.prompt, doing.targets[0]) == ("What are the people doing?", "skating")
    assert (soup.targets[0], soup.image) == (
        "tomato",
        FileImage(tmp_path / "val2014" / "COCO_val2014_000000393225.jpg"),
    )
    assert skipped == {}


def test_a_vqa_question_with_a_blank_answer_is_skipped(tmp_path: Path) -> None:
    annotations = vqa_annotations()
    annotations["annotations"][0]["answers"][3]["answer"] = ""
    files = write_json(tmp_path / "q.json", vqa_questions()), write_json(tmp_path / "a.json", annotations)
    examples, skipped = load_vqa(*files, tmp_path)
    assert [e.id for e in examples] == ["262148000", "262148001"]
    assert skipped == {"393225000": "no text in answers[].answer"}


# ---------------------------------------------------------------------------------------------------- GQA


def gqa_questions() -> dict[str, Any]:
    def question(image: str, text: str, answer: str, balanced: bool) -> dict[str, Any]:
        return {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
            "entailed": ["05515938"],
            "equivalent": ["05515938"],
            "question": text,
            "imageId": image,
            "isBalanced": balanced,
            "groups": {"global": None, "local": "06-sky_dark"},
            "answer": answer,
            "semanticStr": "select: sky (2486325)->verify color: dark [0]",
            "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
            "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
            "fullAnswer": f"{answer}, it is.",
        }

    return {
        "02930152": question("2354786", "Is the sky dark?", "yes", True),
        "07333408": question("n578733", "What is on the white wall?", "pipe", True),
        "07333405": question("2375429", "Is that pipe red?", "no", False),
    }


def test_gqa_has_its_balanced_questions_with_their_one_answer(tmp_path: Path) -> None:
    path = write_json(tmp_path / "val_all_questions.json", gqa_questions())
    examples, skipped = load_gqa(path, tmp_path)
    assert examples == [
        Example("02930152", "Is the sky dark?", ("yes",), FileImage(tmp_path / "2354786.jpg")),
        Example("07333408", "What is on the white wall?", ("pipe",), FileImage(tmp_path / "n578733.jpg")),
    ]
    assert skipped == {"07333405": "not in GQA's balanced set"}


# ---------------------------------------------------------------------------------------------- Flickr30k

FLICKR30K = [
    (["Two young guys with shaggy hair, outside.", 'A "friend" \u00e9'], "train", "1000092795.jpg"),
    (["Several men in hard hats."] * 5, "train", "10002456.jpg"),
    (["A child in a pink dress.", " "], "train", "1000268201.jpg"),
    (["A man in a blue shirt.", "A man on a ladder."], "val", "1000344755.jpg"),
    (["Two men at a stove."], "test", "1000366164.jpg"),
]


def flickr30k(path: Path, rows: list[tuple[list[str], str, str]] = FLICKR30K) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for i, (captions, split, name) in enumerate(rows):
            sentids = [5 * i + k for k in range(len(captions))]
            writer.writerow([json.dumps(captions), json.dumps(sentids), split, name, i])
    return path


def test_flickr30k_has_the_captions_of_one_split(tmp_path: Path) -> None:
    path = flickr30k(tmp_path / "flickr_annotations_30k.csv")
    examples, skipped = load_flickr30k(path, "caption", tmp_path, split="train", seed=0)
    assert examples == [
        Example(str(i), "", tuple(FLICKR30K[i][0]), FileImage(tmp_path / FLICKR30K[i][2])) for i in range(2)
    ]
    assert skipped == {"2": "no text in raw"}
    splits = {s: load_flickr30k(path, "caption", tmp_path, split=s, seed=0).examples for s in ("train", "val", "test")}
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 2, "val": 1, "test": 1}
    check_disjoint(**splits)


def test_flickr30k_for_retrieval_stays_inside_its_split(tmp_path: Path) -> None:
    path = flickr30k(tmp_path / "flickr_annotations_30k.csv")
    first, second = load_flickr30k(path, "retrieval", tmp_path, split="train", seed=0, negatives=1).examples
    assert first.candidates[0] in FLICKR30K[0][0]
    assert first.candidates[1:] == ("Several men in hard hats.",)
    assert second.candidates[1] in FLICKR30K[0][0]
    with pytest.raises(DataError, match="hard negatives among 1 images"):
        load_flickr30k(path, "retrieval", tmp_path, split="test", seed=0, negatives=1)


def test_an_image_in_two_splits_of_flickr30k_is_refused_by_name(tmp_path: Path) -> None:
    rows = [*FLICKR30K, (["A boy."], "test", "10002456.jpg")]
    path = flickr30k(tmp_path / "flickr.csv", rows)
    with pytest.raises(DataError, match=r"flickr\.csv: splits 'train' and 'test' share image '10002456\.jpg'"):
        load_flickr30k(path, "caption", tmp_path, split="val", seed=0)


def test_a_split_that_flickr30k_lacks_is_an_error_that_names_those_it_has(tmp_path: Path) -> None:
    path = flickr30k(tmp_path / "flickr.csv")
    with pytest.raises(DataError, match=r"no split 'dev'; name one of train, val, test, as in .*flickr\.csv:test"):
        load_flickr30k(path, "caption", tmp_path, split="dev", seed=0)
    with pytest.raises(DataError, match=r"flickr\.csv has several splits; name one of train, val, test"):
        load_dataset(path, "caption", tmp_path, seed=0)


HEADER = "raw,sentids,split,filename,img_id\n"
ROW = '"[""A man.""]",[0],train,1.jpg,0\n'


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "no rows"),
        (HEADER, "no rows"),
        ("raw,sentids,filename,img_id\n" + ROW, "no column split; it needs raw, split, filename, img_id"),
        (HEADER + ROW + "[],[0],train,2.jpg\n", "row 2: it has more or fewer fields"),
        (HEADER + ROW + "[],[0],train,2.jpg,1,\n", "row 2: it has more or fewer fields"),
        (HEADER + ROW + '"[""A man.""],[0],train,2.jpg,1\n', "line 3: not valid CSV"),
        (HEADER + '"[""A man.""] ,"[0],train,1.jpg,0\n', "line 2: not valid CSV"),
        (HEADER + ROW + "A man.,[0],train,2.jpg,1\n", r"img_id 1: is not valid JSON: .*\.$"),
        (HEADER + ROW + "3,[0],train,2.jpg,1\n", "img_id 1: no list of texts in raw"),
        (HEADER + ROW + '"[""A man."", 3]",[0],train,2.jpg,1\n', "img_id 1: no text in raw"),
        (HEADER + ROW + ROW, "row 2: img_id 0 or image '1.jpg' was used before"),
        (HEADER + ROW + ROW.replace("1.jpg", "2.jpg"), "row 2: img_id 0 or image '2.jpg' was used before"),
        (HEADER + ROW + ROW.replace(",0\n", ",7\n"), "row 2: img_id 7 or image '1.jpg' was used before"),
        (HEADER + ROW.replace("1.jpg", " "), "row 1: img_id, filename or split is blank"),
    ],
)
def test_a_bad_flickr30k_file_is_an_error_that_names_the_row(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "flickr.csv").write_text(content)
    with pytest.raises(DataError, match=rf"flickr\.csv.*{complaint}"):
        load_flickr30k(tmp_path / "flickr.csv", "caption", tmp_path, split="train", seed=0)


def test_a_flickr30k_file_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "flickr.csv").write_bytes(HEADER.encode() + b"\xff\xfe")
    with pytest.raises(DataError, match=r"flickr\.csv: not UTF-8"):
        load_flickr30k(tmp_path / "flickr.csv", "caption", tmp_path, split="train", seed=0)


# ------------------------------------------------------------------------------------- what is wrong, by name


def edit(content: Any, *where: Any) -> Any:
    """`content` with the value at a path of keys replaced by the last of `where`, or left out (...)."""
    content = copy.deepcopy(content)
    *path, key, value = where
    inner = content
    for step in path:
        inner = inner[step]
    if value is ...:
        del inner[key]
    else:
        inner[key] = value
    return content


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        (("images", 3), 'no list "images"'),
        (("annotations", {}), 'no list "annotations"'),
        (("images", 1, "x"), "image number 2 of the list: not an object"),
        (("images", 1, "id", ...), "image number 2 of the list: no whole number in id"),
        (("images", 1, "id", "522418"), "image number 2 of the list: no whole number in id"),
        (("images", 1, "id", 391895), "image number 2 of the list: id 391895 was used before"),
        (("images", 1, "file_name", ...), "image 522418: no text in file_name"),
        (("annotations", 1, None), "annotation number 2 of the list: not an object"),
        (("annotations", 1, "id", 37), "annotation number 2 of the list: id 37 was used before"),
        (("annotations", 1, "image_id", 5), "annotation 38: image_id 5 is none of the file's images"),
        (("annotations", 1, "image_id", [1]), "annotation 38: image_id"),
        (("annotations", 1, "caption", ...), r"annotation 38: no text in caption; give one of COCO's captions_\*"),
        (("annotations", 1, "caption", 3), "annotation 38: no text in caption"),
    ],
)
def test_a_bad_captions_file_is_an_error_that_names_the_record(
    tmp_path: Path, where: tuple[Any, ...], complaint: str
) -> None:
    path = write_json(tmp_path / "captions.json", edit(coco_captions(), *where))
    with pytest.raises(DataError, match=rf"captions\.json.*{complaint}"):
        load_coco_captions(path, "caption", tmp_path, seed=0)


@pytest.mark.parametrize(
    ("file", "where", "complaint"),
    [
        ("questions", ("questions", 3), 'q.json: there is no list "questions"'),
        ("questions", ("questions", 1, []), "q.json, question number 2 of the list: not an object"),
        ("questions", ("questions", 1, "question_id", 262148000), "number 2 .*: question_id 262148000 was used before"),
        ("questions", ("questions", 1, "image_id", ...), "question 262148001: no whole number in image_id"),
        ("questions", ("questions", 1, "question", None), "question 262148001: no text in question"),
        ("questions", ("questions", 1, "image_id", 7), "question 262148001: .*a.json has no answers to it, or of"),
        ("questions", ("data_type", "abstract_v002"), "data_type"),
        ("questions", ("data_subtype", ...), "data_subtype"),
        ("annotations", ("annotations", 2), 'a.json: there is no list "annotations"'),
        ("annotations", ("annotations", 2, "question_id", 262148000), "a.json, annotation number 3 .*used before"),
        ("annotations", ("annotations", 2, ...), "question 262148001: .*a.json has no answers to it"),
        ("annotations", ("annotations", 2, "answers", ...), "question 262148001: .*a.json: no answers"),
        (
            "annotations",
            ("annotations", 2, "answers", 4, "no"),
            r"question 262148001: .*a.json: no text in answers\[\].answer\.$",
        ),
        ("annotations", ("annotations", 2, "answers", 4, "answer", 2), "question 262148001: .*a.json: no text"),
    ],
)
def test_a_bad_vqa_file_is_an_error_that_names_the_question(
    tmp_path: Path, file: str, where: tuple[Any, ...], complaint: str
) -> None:
    contents = {"questions": vqa_questions(), "annotations": vqa_annotations()}
    contents[file] = edit(contents[file], *where)
    questions = write_json(tmp_path / "q.json", contents["questions"])
    annotations = write_json(tmp_path / "a.json", contents["annotations"])
    with pytest.raises(DataError, match=complaint):
        load_vqa(questions, annotations, tmp_path)


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        (("07333408", None), "question 07333408: not an object"),
        (("07333408", "imageId", ...), "question 07333408: no text in imageId"),
        (("07333408", "imageId", 578733), "question 07333408: no text in imageId"),
        (("07333408", "question", 3), "question 07333408: no text in question"),
        (("07333408", "answer", ...), "question 07333408: no text in answer"),
        (("07333408", "isBalanced", ...), "question 07333408: no true or false in isBalanced"),
        (("07333408", "isBalanced", "yes"), "question 07333408: no true or false in isBalanced"),
    ],
)
def test_a_bad_gqa_file_is_an_error_that_names_the_question(
    tmp_path: Path, where: tuple[Any, ...], complaint: str
) -> None:
    path = write_json(tmp_path / "gqa.json", edit(gqa_questions(), *where))
    with pytest.raises(DataError, match=rf"gqa\.json, {complaint}\.$"):
        load_gqa(path, tmp_path)


def test_a_question_that_stands_twice_in_a_gqa_file_is_an_error(tmp_path: Path) -> None:
    one = json.dumps(gqa_questions()["02930152"])
    (tmp_path / "gqa.json").write_text(f'{{"1": {one}, "2": {one}, "1": {one}}}')
    with pytest.raises(DataError, match=r"gqa\.json: is not valid JSON: duplicate key '1'"):
        load_gqa(tmp_path / "gqa.json", tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "{}", '{"images": []}', "\xff", "[" * 200_000])
def test_a_file_that_is_something_else_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content, encoding="latin-1")
    loaders: list[Callable[[], Loaded]] = [
        lambda: load_coco(path, "vqa", tmp_path, seed=0),
        lambda: load_coco_captions(path, "caption", tmp_path, seed=0),
        lambda: load_vqa(path, path, tmp_path),
        lambda: load_textvqa(path, tmp_path),
        lambda: load_gqa(path, tmp_path),
        lambda: load_dataset(path, "vqa", tmp_path, seed=0),
    ]
    for load_it in loaders:
        with pytest.raises(DataError, match=r"other\.json"):
            load_it()


ODD_VALUES = [None, True, -1, 10**30, 0.5, "", " ", "\0", "\ud800", "x" * 5000, "../..", [], [[]], {}, {"id": 1}]


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in JSON content."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@pytest.mark.parametrize("name", ["captions", "questions", "annotations", "gqa", "textvqa", "coco"])
def test_whatever_stands_in_a_file_it_is_read_or_refused_by_name(tmp_path: Path, name: str) -> None:
    sound = {
        "captions": coco_captions(),
        "questions": vqa_questions(),
        "annotations": vqa_annotations(),
        "gqa": gqa_questions(),
        "textvqa": TEXTVQA,
        "coco": {"data": [{k: v for k, v in RECORDS[1].items() if k != "retrieval"}]},
    }[name]
    vqa_files(tmp_path)
    files = {"questions": tmp_path / QUESTIONS, "annotations": tmp_path / ANNOTATIONS}
    path = files.get(name, tmp_path / f"{name}.json")
    given, task = files["questions"] if name == "annotations" else path, "caption" if name == "captions" else "vqa"
    for where in places(sound):
        for value in (*ODD_VALUES, ...):
            write_json(path, edit(sound, *where, value))
            complaint = complaint_about(given, task, tmp_path)
            assert complaint is None or path.name in complaint
            assert "\n" not in (complaint or "")


def complaint_about(path: Path, task: str, images: Path) -> str | None:
    try:
        check_disjoint(one=load_dataset(path, task, images, seed=0).examples)
    except DataError as error:
        return str(error)
    return None


# ----------------------------------------------------------------------------------------------- any of them


def test_any_file_is_told_by_what_it_holds(tmp_path: Path) -> None:
    questions, annotations = vqa_files(tmp_path)
    captions = write_json(tmp_path / "a.json", coco_captions())
    gqa = write_json(tmp_path / "b.json", gqa_questions())
    textvqa = write_json(tmp_path / "c.json", TEXTVQA)
    flickr = flickr30k(tmp_path / "d.csv")

    def load_any(path: Path | str, task: str) -> Loaded:
        return load_dataset(path, task, tmp_path, seed=3, negatives=1)

    assert load_any(questions, "vqa") == load_vqa(questions, annotations, tmp_path)
    assert load_any(gqa, "vqa") == load_gqa(gqa, tmp_path)
    assert load_any(textvqa, "vqa") == load_textvqa(textvqa, tmp_path)
    for task in ("caption", "retrieval"):
        options: dict[str, Any] = {"seed": 3, "negatives": 1}
        assert load_any(captions, task) == load_coco_captions(captions, task, tmp_path, **options)
        assert load_any(EXCERPT, task) == load_coco(EXCERPT, task, tmp_path, **options)
        assert load_any(f"{flickr}:train", task) == load_flickr30k(flickr, task, tmp_path, split="train", **options)


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_a_limit_gives_the_first_examples_as_they_are_without_it(tmp_path: Path, task: str) -> None:
    everything = load_dataset(EXCERPT, task, tmp_path, seed=3, negatives=4)
    assert load_dataset(EXCERPT, task, tmp_path, seed=3, negatives=4, limit=3) == (
        everything.examples[:3],
        everything.skipped,
    )


def test_a_task_that_a_file_lacks_is_an_error_that_names_those_it_has(tmp_path: Path) -> None:
    questions, _ = vqa_files(tmp_path)
    gqa = write_json(tmp_path / "gqa.json", gqa_questions())
    textvqa = write_json(tmp_path / "textvqa.json", TEXTVQA)
    captions = write_json(tmp_path / "captions.json", coco_captions())
    flickr = flickr30k(tmp_path / "flickr.csv")
    for path in (questions, gqa, textvqa):
        with pytest.raises(DataError, match="has no task 'caption'; choose one of vqa"):
            load_dataset(path, "caption", tmp_path, seed=0)
    for path in (captions, f"{flickr}:test"):
        with pytest.raises(DataError, match="has no task 'vqa'; choose one of caption, retrieval"):
            load_dataset(path, "vqa", tmp_path, seed=0)


def test_vqa_questions_without_their_annotations_are_an_error_that_says_so(tmp_path: Path) -> None:
    questions, annotations = vqa_files(tmp_path)
    with pytest.raises(DataError, match=rf"{ANNOTATIONS} has annotations alone; of VQA give the question file"):
        load_dataset(annotations, "vqa", tmp_path, seed=0)
    annotations.unlink()
    with pytest.raises(DataError, match=rf"{QUESTIONS} needs {ANNOTATIONS} beside it"):
        load_dataset(questions, "vqa", tmp_path, seed=0)
    with pytest.raises(DataError, match=r"other\.json needs its annotations beside it, named as released"):
        load_dataset(questions.rename(tmp_path / "other.json"), "vqa", tmp_path, seed=0)
