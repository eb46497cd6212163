"""Loading examples: what the files say is what comes out, bad input is named, splits stay apart."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hones_offline.examples import (
    Example,
    FileImage,
    Loaded,
    MemoryImage,
    check_disjoint,
    load_coco,
    load_jsonl,
    load_textvqa,
    scene_examples,
    with_hard_negatives,
)
from hones_offline.metrics import caption_tokens
from hones_offline.scenes import scenes
from PIL import Image

from hones_steer.errors import DataError

EXCERPT = Path(__file__).parent / "data" / "coco_excerpt.json"
RECORDS: list[dict[str, Any]] = json.loads(EXCERPT.read_text())["data"]
BLUE = (0, 0, 255)


def grey_image(path: Path, size: tuple[int, int] = (20, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (128, 128, 128)).save(path)
    return path


@pytest.fixture(scope="module")
def coco_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images of the size and name that the excerpt gives."""
    root = tmp_path_factory.mktemp("coco")
    for record in RECORDS:
        info = record["image_info"]
        grey_image(root / info["file_name"], (info["width"], info["height"]))
    return root


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


# ------------------------------------------------------------------------------------------------- images


def test_an_image_file_is_loaded_as_rgb(tmp_path: Path) -> None:
    Image.new("L", (4, 3), 7).save(tmp_path / "grey.png")
    image = FileImage(tmp_path / "grey.png").load()
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 3), (7, 7, 7))


def test_a_rotated_photo_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "photo.jpg", exif=exif)
    assert FileImage(tmp_path / "photo.jpg").load().size == (4, 8)


def test_the_box_is_blue_around_the_region_and_leaves_it_alone(tmp_path: Path) -> None:
    path = grey_image(tmp_path / "a.png", (60, 40))
    pixels = np.asarray(FileImage(path, box=(20.0, 10.0, 15.0, 8.0)).load())
    blue = (pixels == BLUE).all(axis=-1)
    expected = np.zeros((40, 60), dtype=bool)
    expected[8:20, 18:37] = True
    expected[10:18, 20:35] = False
    assert np.array_equal(blue, expected)
    assert (pixels[~blue] == 128).all()


def test_a_box_that_leaves_the_image_is_clipped(tmp_path: Path) -> None:
    path = grey_image(tmp_path / "a.png", (60, 40))
    pixels = np.asarray(FileImage(path, box=(-3.0, 30.0, 10.0, 99.0)).load())
    blue = (pixels == BLUE).all(axis=-1)
    assert blue[28:, 0].all()
    assert blue[-1, :9].all()
    assert not blue[:28].any()
    assert not blue[:, 9:].any()


@pytest.mark.parametrize("box", [(70.0, 5.0, 4.0, 4.0), (5.0, -9.0, 4.0, 4.0)])
def test_a_box_outside_the_image_is_an_error(tmp_path: Path, box: tuple[float, float, float, float]) -> None:
    path = grey_image(tmp_path / "a.png", (60, 40))
    with pytest.raises(DataError, match=r"outside image .*a\.png.* 60x40"):
        FileImage(path, box).load()


def test_a_missing_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg"):
        FileImage(tmp_path / "gone.jpg").load()
    with pytest.raises(DataError, match=tmp_path.name):
        FileImage(tmp_path).load()


def complaint_about(path: Path) -> str | None:
    try:
        FileImage(path).load()
    except DataError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore")  # Pillow may warn before it gives up
@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp", "tiff"])
def test_a_damaged_image_is_an_error_that_names_it_or_still_an_image(tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(3407)
    path = tmp_path / f"damaged.{kind}"
    Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(path)
    sound = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for trial in range(120):
        damaged = sound[: random.integers(len(sound))] if trial % 2 else sound.copy()
        if trial % 2 == 0:
            damaged[random.integers(len(sound), size=4)] = random.integers(256, size=4)
        path.write_bytes(damaged.tobytes())
        complaint = complaint_about(path)
        assert complaint is None or path.name in complaint
        refused += complaint is not None
    assert refused >= 30  # at least a half of those cut short


def test_an_image_in_memory_is_given_as_rgb() -> None:
    image = MemoryImage(Image.new("L", (2, 2), 9), key="nine")
    assert image.load().getpixel((1, 1)) == (9, 9, 9)
    assert image.key == "nine"


# ------------------------------------------------------------------------------------------------ example


@pytest.mark.parametrize("targets", [(), ("",), ("cat", " ")])
def test_an_example_needs_targets(targets: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="'7'"):
        Example("7", "What?", targets, None)


# -------------------------------------------------------------------------------------------------- JSONL


def test_jsonl_gives_its_lines_with_images_beside_it(tmp_path: Path) -> None:
    grey_image(tmp_path / "images" / "a.png")
    path = write_lines(
        tmp_path / "own.jsonl",
        {"image": "images/a.png", "prompt": "What?", "targets": ["grey", "a wall"], "id": "first"},
        "",
        {"prompt": "2 + 2 =\u2028", "targets": ["4"], "note": "ignored"},
        {"prompt": "capital of Peru?", "targets": ["Lima"], "image": None, "id": 17},
    )
    examples, skipped = load_jsonl(path)
    assert skipped == {}
    assert [e.id for e in examples] == ["first", "3", "17"]
    assert [e.targets for e in examples] == [("grey", "a wall"), ("4",), ("Lima",)]
    assert examples[1].prompt == "2 + 2 =\u2028"
    assert examples[0].image is not None
    assert examples[0].image.load().size == (20, 10)
    assert examples[1].image is None
    assert examples[2].image is None


GOOD = '{"prompt": "What?", "targets": ["cat"]}'


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "JSON"),
        ("[" * 200_000, "JSON"),
        ("[1]", "object"),
        ('"text"', "object"),
        ('{"targets": ["cat"]}', "prompt"),
        ('{"prompt": "", "targets": ["cat"]}', "prompt"),
        ('{"prompt": 3, "targets": ["cat"]}', "prompt"),
        ('{"prompt": "\\ud800", "targets": ["cat"]}', "prompt"),
        ('{"prompt": "What?"}', "targets"),
        ('{"prompt": "What?", "targets": []}', "targets"),
        ('{"prompt": "What?", "targets": [" "]}', "targets"),
        ('{"prompt": "What?", "targets": "cat"}', "targets"),
        ('{"prompt": "What?", "targets": ["cat", 2]}', "targets"),
        ('{"prompt": "What?", "targets": {"cat": 1}}', "targets"),
        ('{"prompt": "What?", "targets": ["cat"], "image": 3}', "image"),
        ('{"prompt": "What?", "targets": ["cat"], "image": ""}', "image"),
        ('{"prompt": "What?", "targets": ["cat"], "image": "a\\u0000b"}', "image"),
        ('{"prompt": "What?", "targets": ["cat"], "id": ""}', "id"),
        ('{"prompt": "What?", "targets": ["cat"], "id": true}', "id"),
        ('{"prompt": "What?", "targets": ["cat"], "id": "1"}', "'1' was used before"),
    ],
)
def test_a_bad_line_is_an_error_that_names_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = write_lines(tmp_path / "own.jsonl", GOOD, line)
    with pytest.raises(DataError, match=rf"own\.jsonl, line 2: .*{complaint}"):
        load_jsonl(path)


def test_a_line_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_bytes(GOOD.encode() + b"\n\xff\xfe")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        load_jsonl(tmp_path / "own.jsonl")


@pytest.mark.parametrize("load", [load_jsonl, lambda path: load_textvqa(path, ".")])
def test_a_missing_or_empty_file_is_an_error(tmp_path: Path, load: Any) -> None:
    with pytest.raises(DataError, match=r"none\.json"):
        load(tmp_path / "none.json")
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(DataError, match=r"empty\.json"):
        load(tmp_path / "empty.json")


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


# --------------------------------------------------------------------------------------------- negatives


def test_retrieval_has_one_positive_and_negatives_of_other_images(tmp_path: Path) -> None:
    examples, _ = load("retrieval", tmp_path, negatives=9)
    owner = {c["caption"]: r["image_id"] for r in RECORDS for c in r["retrieval"]}
    for example in examples:
        owners = [owner[candidate] for candidate in example.candidates]
        assert str(owners[0]) == example.id
        assert len(set(owners)) == 10  # the positive's image, and every other one once
        assert example.targets == ("Yes",)


def test_the_hardest_negatives_come_first(tmp_path: Path) -> None:
    """Against TF-IDF computed the long way: each image's best caption, the best image first."""
    owner = {c["caption"]: str(r["image_id"]) for r in RECORDS for c in r["retrieval"]}
    words = {caption: Counter(caption_tokens(caption)) for caption in owner}
    documents = Counter(word for count in words.values() for word in count)
    vocabulary = sorted(documents)
    idf = np.log((len(words) + 1) / (np.array([documents[w] for w in vocabulary]) + 1)) + 1
    vectors = {c: np.array([count[w] for w in vocabulary]) * idf for c, count in words.items()}
    units = {caption: vector / np.linalg.norm(vector) for caption, vector in vectors.items()}
    for example in load("retrieval", tmp_path, negatives=4).examples:
        cosines = {caption: float(unit @ units[example.candidates[0]]) for caption, unit in units.items()}
        best: dict[str, float] = {}
        for caption, cosine in cosines.items():
            best[owner[caption]] = max(cosine, best.get(owner[caption], 0.0))
        del best[example.id]
        chosen = [cosines[candidate] for candidate in example.candidates[1:]]
        assert chosen == pytest.approx(sorted(best.values(), reverse=True)[:4])


def test_a_stop_sign_is_hardest_to_tell_from_another_stop_sign(tmp_path: Path) -> None:
    by_id = {e.id: e for e in load("retrieval", tmp_path).examples}
    owner = {c["caption"]: str(r["image_id"]) for r in RECORDS for c in r["retrieval"]}
    assert owner[by_id["364374"].candidates[1]] == "215215"
    assert owner[by_id["215215"].candidates[1]] == "364374"


def test_negatives_are_deterministic_for_the_seed(tmp_path: Path) -> None:
    first = load("retrieval", tmp_path, seed=1)
    assert first == load("retrieval", tmp_path, seed=1)
    assert first != load("retrieval", tmp_path, seed=2)


def retrieval_example(name: str, *captions: str, key: str | None = None) -> Example:
    image = MemoryImage(Image.new("RGB", (1, 1)), key or name)
    return Example(name, "", ("Yes",), image, captions)


def test_a_caption_that_fits_the_image_is_no_negative() -> None:
    examples = [
        retrieval_example("a", "A red bus."),
        retrieval_example("b", "a red  bus", "a blue car"),  # worded like a's own
        retrieval_example("c", "a red bus on a road", key="a"),  # another record of a's image
        retrieval_example("d", "a big red bus"),
    ]
    for seed in range(5):
        of_a = with_hard_negatives(examples, 2, seed)[0]
        assert of_a.candidates == ("A red bus.", "a big red bus", "a blue car")


def test_no_two_negatives_are_worded_alike() -> None:
    examples = [retrieval_example(n, f"a {n} bus") for n in "abcd"] + [retrieval_example("e", "A C bus!")]
    candidates = with_hard_negatives(examples, 3, seed=0)[0].candidates
    assert len({tuple(caption_tokens(c)) for c in candidates}) == 4


def test_too_few_images_for_the_negatives_is_an_error_with_the_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="9 hard negatives among 10 images, 49 were asked for"):
        load("retrieval", tmp_path, negatives=49)
    with pytest.raises(DataError, match="at least 1"):
        load("retrieval", tmp_path, negatives=0)


# ------------------------------------------------------------------------------------------------ TextVQA


def test_textvqa_is_read_as_vqa(tmp_path: Path) -> None:
    record = {"question": "what brand?", "image_id": "003a", "question_id": 34602, "answers": ["dakota"] * 10}
    path = tmp_path / "textvqa.json"
    path.write_text(json.dumps({"dataset_name": "textvqa", "data": [record, {"question_id": 7}]}))
    (example,), skipped = load_textvqa(path, tmp_path)
    assert example == Example("34602", "what brand?", ("dakota",) * 10, FileImage(tmp_path / "003a.jpg"))
    assert skipped == {"7": "no text in question"}


# ------------------------------------------------------------------------------------------------- scenes


def test_scenes_give_examples_of_every_task() -> None:
    made = scenes("test", 4)
    for scene, example in zip(made, scene_examples("vqa", made), strict=True):
        assert (example.prompt, example.targets) == (scene.question, (scene.answer,))
        assert example.image is not None
        assert np.array_equal(np.asarray(example.image.load()), scene.pixels())
    assert [e.targets for e in scene_examples("ocr", made)] == [(s.text,) for s in made]
    assert [e.targets for e in scene_examples("caption", made)] == [s.captions for s in made]
    assert [e.candidates for e in scene_examples("retrieval", made, 3)] == [s.candidates(3) for s in made]


def test_a_scene_keeps_its_identity_in_every_list() -> None:
    made = scenes("dev", 6)
    early, late = scene_examples("vqa", made[:3]), scene_examples("ocr", made)[:3]
    assert [e.id for e in early] == [e.id for e in late]
    assert len({e.id for e in scene_examples("ocr", made)}) == 6
    check_disjoint(dev=scene_examples("vqa", made), test=scene_examples("vqa", scenes("test", 50)))
    with pytest.raises(DataError, match="share image"):
        check_disjoint(dev=early, test=late)


def test_a_scenes_image_is_told_by_what_it_shows() -> None:
    scene, other = scenes("dev", 2)
    variants = [scene, replace(scene, style=scene.style + 1), replace(scene, cells=other.cells)]
    keys = [e.image.key for e in scene_examples("vqa", variants) if e.image is not None]
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]


def test_scenes_know_no_other_task() -> None:
    with pytest.raises(DataError, match="'count'"):
        scene_examples("count", scenes("test", 1))


# ------------------------------------------------------------------------------------------------- splits


def test_splits_that_share_an_image_are_refused_by_name(tmp_path: Path) -> None:
    path = grey_image(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(path)
    one = Example("1", "What?", ("cat",), FileImage(path))
    boxed = Example("2", "", ("STOP",), FileImage(tmp_path / "link.png", box=(1, 1, 2, 2)))
    other = Example("3", "What?", ("cat",), FileImage(tmp_path / "b.png"))
    check_disjoint(discovery=[one, one], dev=[other])
    with pytest.raises(DataError, match=r"'discovery' and 'test' share image '.*a\.png'"):
        check_disjoint(discovery=[one], dev=[other], test=[boxed])


def test_texts_alone_are_shared_freely() -> None:
    text = Example("1", "What?", ("cat",), None)
    check_disjoint(discovery=[text], test=[text])
