"""Examples have the content of their files, bad input is named in the error, and splits stay apart."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hones_offline.data.examples import (
    Example,
    FileImage,
    MemoryImage,
    check_disjoint,
    fingerprint,
    load_jsonl,
    scene_examples,
    split_by_image,
)
from hones_offline.data.scenes import scenes
from PIL import Image

from hones_steer.errors import DataError

BLUE = (0, 0, 255)


def gray_image(path: Path, size: tuple[int, int] = (20, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (128, 128, 128)).save(path)
    return path


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


# ------------------------------------------------------------------------------------------------- images


def test_an_image_file_is_loaded_as_rgb(tmp_path: Path) -> None:
    Image.new("L", (4, 3), 7).save(tmp_path / "gray.png")
    image = FileImage(tmp_path / "gray.png").load()
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 3), (7, 7, 7))


def test_a_rotated_photo_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "photo.jpg", exif=exif)
    assert FileImage(tmp_path / "photo.jpg").load().size == (4, 8)


def test_the_box_is_blue_around_the_region_and_leaves_it_alone(tmp_path: Path) -> None:
    path = gray_image(tmp_path / "a.png", (60, 40))
    pixels = np.asarray(FileImage(path, box=(20.0, 10.0, 15.0, 8.0)).load())
    blue = (pixels == BLUE).all(axis=-1)
    expected = np.zeros((40, 60), dtype=bool)
    expected[8:20, 18:37] = True
    expected[10:18, 20:35] = False
    assert np.array_equal(blue, expected)
    assert (pixels[~blue] == 128).all()


def test_a_box_that_leaves_the_image_is_clipped(tmp_path: Path) -> None:
    path = gray_image(tmp_path / "a.png", (60, 40))
    pixels = np.asarray(FileImage(path, box=(-3.0, 30.0, 10.0, 99.0)).load())
    blue = (pixels == BLUE).all(axis=-1)
    assert blue[28:, 0].all()
    assert blue[-1, :9].all()
    assert not blue[:28].any()
    assert not blue[:, 9:].any()


@pytest.mark.parametrize("box", [(70.0, 5.0, 4.0, 4.0), (5.0, -9.0, 4.0, 4.0)])
def test_a_box_outside_the_image_is_an_error(tmp_path: Path, box: tuple[float, float, float, float]) -> None:
    path = gray_image(tmp_path / "a.png", (60, 40))
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
    gray_image(tmp_path / "images" / "a.png")
    path = write_lines(
        tmp_path / "own.jsonl",
        {"image": "images/a.png", "prompt": "What?", "targets": ["gray", "a wall"], "id": "first"},
        "",
        {"prompt": "2 + 2 =\u2028", "targets": ["4"], "note": "ignored"},
        {"prompt": "capital of Peru?", "targets": ["Lima"], "image": None, "id": 17},
    )
    examples, skipped = load_jsonl(path)
    assert skipped == {}
    assert [e.id for e in examples] == ["first", "3", "17"]
    assert [e.targets for e in examples] == [("gray", "a wall"), ("4",), ("Lima",)]
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
        ("[" * 200_000, "nested too deep"),
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
        ('{"prompt": "What?", "targets": ["cat"], "prompt": "Who?"}', "duplicate key 'prompt'"),
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


def test_a_missing_or_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl"):
        load_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        load_jsonl(tmp_path / "empty.jsonl")


# ------------------------------------------------------------------------------------------------- scenes


def test_scenes_give_examples_of_every_task() -> None:
    made = scenes("test", 4)
    for scene, example in zip(made, scene_examples("vqa", made), strict=True):
        assert (example.prompt, example.targets) == (scene.question, (scene.answer,))
        assert example.image is not None
        assert np.array_equal(np.asarray(example.image.load()), scene.pixels())
    assert [e.targets for e in scene_examples("ocr", made)] == [(s.text[::-1],) for s in made]
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
    path = gray_image(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(path)
    one = Example("1", "What?", ("cat",), FileImage(path))
    boxed = Example("2", "", ("STOP",), FileImage(tmp_path / "link.png", box=(1, 1, 2, 2)))
    other = Example("3", "What?", ("cat",), FileImage(tmp_path / "b.png"))
    check_disjoint(discovery=[one, one], dev=[other])
    with pytest.raises(DataError, match=r"'discovery' and 'test' share image '.*a\.png'"):
        check_disjoint(discovery=[one], dev=[other], test=[boxed])


def test_splits_that_share_an_example_without_an_image_are_refused_by_name() -> None:
    one, again = Example("1", "2 + 2", ("4",), None), Example("9", "2 + 2", ("4",), None)
    other = Example("1", "2 + 2", ("four",), None)
    check_disjoint(discovery=[one, again], dev=[other])
    with pytest.raises(DataError, match="'dev' and 'test' share example '9'"):
        check_disjoint(discovery=[other], dev=[one], test=[again])


def photo(path: str) -> list[Example]:
    return [Example(path, "What?", ("cat",), FileImage(Path(path)))]


def test_cocos_releases_name_the_same_photograph_differently() -> None:
    old, new = photo("/coco/val2014/COCO_val2014_000000391895.jpg"), photo("/coco17/train2017/000000391895.jpg")
    with pytest.raises(DataError, match=r"'dev' and 'test' share image '/coco17.*\.jpg', which is '/coco/.*\.jpg' in"):
        check_disjoint(dev=old, test=new)
    check_disjoint(dev=old, test=photo("/coco17/train2017/000000391896.jpg"))


def test_equal_names_in_other_folders_are_other_images() -> None:
    check_disjoint(dev=photo("/film/a/000000000001.jpg"), test=photo("/film/b/000000000001.jpg"))


def test_prompts_are_shared_freely() -> None:
    text, photographed = Example("1", "What?", ("cat",), None), photo("/coco/cat.jpg")
    check_disjoint(discovery=[text, *photographed], test=[replace(text, targets=("dog",)), *photo("/coco/dog.jpg")])


def test_a_fingerprint_is_of_what_is_asked_and_answered_and_seen() -> None:
    one = Example(
        "a", "Which?", ("cat",), FileImage(Path("/coco/train2014/COCO_train2014_000000391895.jpg"), (1, 2, 3, 4))
    )
    same = replace(one, id="b", image=FileImage(Path("/coco17/val2017/000000391895.jpg"), (1, 2, 3, 4)))
    assert fingerprint(one) == fingerprint(same)
    others = [
        replace(one, prompt="What?"),
        replace(one, targets=("a cat",)),
        replace(one, candidates=("cat", "dog")),
        replace(one, image=None),
        replace(one, image=replace(one.image, box=None)),
        replace(one, image=FileImage(Path("/coco/train2014/COCO_train2014_000000391896.jpg"), (1, 2, 3, 4))),
    ]
    assert len({fingerprint(example) for example in (one, *others)}) == 7
    assert len(fingerprint(one)) == 12


def test_splits_are_drawn_by_image_seeded_and_leave_the_rest() -> None:
    names = [f"/coco/{release}/{i:012}.jpg" for i in range(20) for release in ("train2017", "val2017")]
    seen = [Example(str(i), "?", ("a",), FileImage(Path(name))) for i, name in enumerate(names)]
    text = [Example(f"t{i}", f"{i // 2}?", ("a",), None) for i in range(20)]
    examples = [*seen, *text]  # 20 photographs under two names each, and 10 questions asked twice
    rest, drawn = split_by_image(examples, {"dev": 0.25, "test": 0.2}, seed=1)
    check_disjoint(data=rest, **drawn)
    assert {name: len(part) for name, part in drawn.items()} == {"dev": 16, "test": 12}  # pairs stay together
    assert sorted(e.id for part in (rest, *drawn.values()) for e in part) == sorted(e.id for e in examples)
    for part in (rest, *drawn.values()):
        assert part == [e for e in examples if e in part]  # in their order
    assert split_by_image(examples, {"dev": 0.25, "test": 0.2}, seed=1) == (rest, drawn)
    assert split_by_image(examples, {"dev": 0.25, "test": 0.2}, seed=2) != (rest, drawn)
    assert split_by_image(examples, {}, seed=1) == (examples, {})
    with pytest.raises(DataError, match="2 examples with 1 images cannot be divided into 2 splits that share none"):
        split_by_image(seen[:2], {"dev": 0.5}, seed=1)
