"""A folder of profiles, and expressions such as ``vqa@0.5+ocr``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from steer.profiles import identity, make, rows, scales_of, task_names

from hones_steer import MismatchError, Profile, ProfileError, ProfileStore, RoutingError, save_profile
from hones_steer.store import combine, known_tasks, parse_expression

VQA = make("vqa", {1: {0: 0.5, 7: 1.5}, 3: {4: -2.0}})
OCR = make("ocr", {1: {7: 2.0}, 5: {9: 0.25}})


def lookup(name: str) -> Profile:
    known = {"vqa": VQA, "ocr": OCR}
    if name not in known:
        raise RoutingError(f"there is no profile for the task {name!r}; known tasks: ocr, vqa")
    return known[name]


def combined(text: str) -> Profile | None:
    return combine(parse_expression(text), lookup)


# Expressions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("none", "none"),
        ("vqa", "vqa"),
        ("vqa@1", "vqa"),
        ("vqa@1.000", "vqa"),
        ("vqa@0.5", "vqa@0.5"),
        ("vqa@0.050", "vqa@0.05"),
        ("vqa@-1.25", "vqa@-1.25"),
        ("vqa@-0.001", "vqa@-0.001"),
        ("vqa@10", "vqa@10"),
        ("vqa@10.000", "vqa@10"),
        ("vqa@-10", "vqa@-10"),
        ("vqa+ocr", "ocr+vqa"),
        ("ocr+vqa", "ocr+vqa"),
        ("vqa@0.1+ocr+vqa@0.2", "ocr+vqa@0.3"),
        ("vqa@0", "none"),
        ("vqa@-0", "none"),
        ("vqa+vqa@-1", "none"),
        ("vqa@0+ocr", "ocr"),
        ("vqa@9.5+vqa@9.5", "vqa@10+vqa@9"),
        ("vqa@-10+vqa@-0.5", "vqa@-10+vqa@-0.5"),
        ("a.b-c_D.1", "a.b-c_D.1"),
        ("NONE", "NONE"),
        ("+".join("abcdefgh"), "a+b+c+d+e+f+g+h"),
        ("a" * 64, "a" * 64),
        ("None+none1", "None+none1"),
    ],
)
def test_accepted(text: str, canonical: str) -> None:
    expression = parse_expression(text)
    assert str(expression) == canonical
    assert parse_expression(canonical) == expression


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "vqa+",
        "+vqa",
        "vqa++ocr",
        "@1",
        "vqa@",
        "vqa@@1",
        "vqa@1@2",
        " vqa",
        "vqa ",
        "vqa\n",
        "vqa + ocr",
        "vqa@ 1",
        "none+vqa",
        "vqa+none",
        "none@1",
        "none@0",
        "vqa@1.2345",
        "vqa@0.0001",
        "vqa@10.001",
        "vqa@-10.001",
        "vqa@11",
        "vqa@100",
        "vqa@1e1",
        "vqa@nan",
        "vqa@inf",
        "vqa@--1",
        "vqa@.5",
        "vqa@1.",
        "vqa@01",
        "vqa@0x1",
        "vqa@1_0",
        "vqa@١",
        "vqa@1\n",
        "../vqa",
        "/etc/passwd",
        ".vqa",
        "-vqa",
        "größe",
        "v\0qa",
        "a" * 65,
        "+".join("abcdefghi"),
        "+".join(["vqa@0.5"] * 9),
    ],
)
def test_rejected(text: str) -> None:
    with pytest.raises(RoutingError) as caught:
        parse_expression(text)
    assert str(caught.value).isprintable()


def test_the_length_limit() -> None:
    longest = "+".join(["a" * 64, "b" * 64, "c" * 64, "d" * 61])
    assert len(longest) == 256
    assert len(parse_expression(longest).terms) == 4
    with pytest.raises(RoutingError, match="257 characters; at most 256"):
        parse_expression(longest + "d")


def test_the_message_names_the_culprit() -> None:
    with pytest.raises(RoutingError, match=r"'1\.2345' in the steering expression 'vqa\+ocr@1\.2345'"):
        parse_expression("vqa+ocr@1.2345")
    with pytest.raises(RoutingError, match="'o/cr' in the steering expression"):
        parse_expression("vqa+o/cr")


@given(st.lists(st.tuples(task_names(), st.integers(-10_000, 10_000)), min_size=1, max_size=3))
def test_strengths_add_in_exact_thousandths(terms: list[tuple[str, int]]) -> None:
    text = "+".join(f"{name}@{thousandths / 1000:.3f}" for name, thousandths in terms)
    expression = parse_expression(text)
    sums = {name: sum(t for other, t in terms if other == name) for name, _ in terms}
    assert dict(expression.terms) == {name: total for name, total in sums.items() if total}
    assert list(expression.names) == sorted(sums)
    assert expression == parse_expression("+".join(reversed(text.split("+"))))
    assert parse_expression(str(expression)) == expression


@given(st.text(max_size=300))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parse_expression(text)
    except RoutingError:
        return
    assert text.isascii()
    assert "\n" not in text
    assert " " not in text


# Combining ----------------------------------------------------------------------------------------


def test_one_task_at_full_strength_is_the_profile_itself() -> None:
    assert combined("vqa") is VQA
    assert combined("vqa@0.25+vqa@0.75") is VQA


@pytest.mark.parametrize("text", ["none", "vqa@0", "vqa+vqa@-1", "vqa@0+ocr@0", "vqa+ocr+ocr@-1+vqa@-1"])
def test_nothing_left_is_none(text: str) -> None:
    assert combined(text) is None


def test_the_algebra_is_the_profiles_own() -> None:
    assert combined("vqa@0.5") == VQA * 0.5
    assert combined("vqa+ocr") == VQA + OCR
    assert combined("vqa+ocr@-1") == VQA - OCR
    assert combined("ocr@2") == OCR + OCR


def test_the_scales_by_hand() -> None:
    profile = combined("vqa@0.5+ocr@-2")
    assert profile is not None
    assert scales_of(profile) == {(1, 0): 0.75, (1, 7): -0.75, (3, 4): -0.5, (5, 9): 2.5}


def test_order_and_repetition_do_not_change_the_digest() -> None:
    texts = ["vqa@0.3+ocr@0.7", "ocr@0.7+vqa@0.3", "vqa@0.1+ocr@0.7+vqa@0.2", "ocr@1+vqa@0.3+ocr@-0.3"]
    digests = {profile.digest for profile in map(combined, texts) if profile is not None}
    assert len(digests) == 1


@given(st.lists(rows(20), min_size=2, max_size=4), st.data())
def test_the_sum_is_exact_to_float32(tables: list[dict[int, dict[int, float]]], data: st.DataObject) -> None:
    profiles = {f"t{i}": make(f"t{i}", table) for i, table in enumerate(tables)}
    strengths = {name: data.draw(st.integers(-900, 900), label=name) for name in profiles}
    text = "+".join(f"{name}@{strength / 1000:.3f}" for name, strength in strengths.items())
    result = combine(parse_expression(text), profiles.__getitem__)
    used = {name: strength for name, strength in strengths.items() if strength}
    assert (result is None) == (not used)
    if result is None:
        return
    for (layer, neuron), scale in scales_of(result).items():
        offsets = [
            strength / 1000 * (scales_of(profiles[name]).get((layer, neuron), 1.0) - 1.0)
            for name, strength in used.items()
        ]
        np.testing.assert_allclose(scale, 1 + sum(offsets), rtol=1e-6, atol=1e-6)


def test_what_a_blend_says_about_itself() -> None:
    blend, half = combined("vqa+ocr@0.5"), combined("vqa@0.5")
    assert blend is not None
    assert half is not None
    assert (blend.task, blend.description) == ("blend", "ocr@0.5+vqa")
    assert (half.task, half.description) == ("vqa", "vqa@0.5")


@pytest.mark.parametrize("text", ["vqa+cap", "cap@0", "vqa+cap@0", "cap+cap@-1"])
def test_an_unknown_task_is_an_error_at_any_strength(text: str) -> None:
    with pytest.raises(RoutingError, match="no profile for the task 'cap'; known tasks: ocr, vqa"):
        combined(text)


def test_scales_beyond_the_limit() -> None:
    with pytest.raises(RoutingError, match=r"'vqa@10\+vqa@10\+vqa@10\+vqa@10' gives scales beyond 100"):
        combined("vqa@10+vqa@10+vqa@10+vqa@10")


def test_profiles_of_different_models() -> None:
    other = make("ocr", base_model=identity(model_type="llama"))
    expression = parse_expression("vqa+ocr")
    profiles = {"vqa": VQA, "ocr": other}
    with pytest.raises(MismatchError, match="profiles of different models"):
        combine(expression, profiles.__getitem__)
    assert combine(expression, profiles.__getitem__, allow_mismatch=True) is not None


# The store ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "profiles"
    folder.mkdir()
    for profile in (VQA, OCR):
        save_profile(profile, folder / f"{profile.task}.safetensors")
    return folder


def test_names_and_resolving(folder: Path) -> None:
    (folder / "notes.txt").touch()
    (folder / "no name.safetensors").touch()
    (folder / "none.safetensors").touch()
    store = ProfileStore(folder)
    assert store.names() == ["ocr", "vqa"]
    assert store.get("vqa") == VQA
    assert store.resolve("vqa+ocr@0.5") == VQA + OCR * 0.5
    assert store.resolve("none") is None


def test_a_profile_is_read_once_and_anew_when_its_file_changes(folder: Path) -> None:
    store = ProfileStore(folder)
    assert store.get("vqa") is store.get("vqa")
    save_profile(VQA * 0.5, folder / "vqa.safetensors")
    assert store.get("vqa") == VQA * 0.5
    (folder / "vqa.safetensors").unlink()
    with pytest.raises(RoutingError, match="no profile for the task 'vqa'; known tasks: ocr"):
        store.get("vqa")


def test_a_replacement_of_equal_size_and_time_is_noticed(folder: Path) -> None:
    path, store = folder / "vqa.safetensors", ProfileStore(folder)
    store.get("vqa")
    status, size = path.stat(), path.stat().st_size
    replacement = make("vqa", {1: {0: 0.5, 7: 1.75}, 3: {4: -2.0}})
    save_profile(replacement, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == size
    assert store.get("vqa") == replacement


def test_an_unknown_task_lists_the_known_ones(folder: Path) -> None:
    with pytest.raises(RoutingError, match="no profile for the task 'cap'; known tasks: ocr, vqa"):
        ProfileStore(folder).resolve("vqa+cap")


def test_of_many_tasks_an_error_names_the_nearest_few() -> None:
    tasks = [f"customer-support-team-europe-{i:04d}-visual-question" for i in range(2_000)] + ["vqa", "VQA-2"]
    known = known_tasks("customer-support-team-europe-0123-visual-questions", tasks, "GET /list")
    near, _, rest = known.removeprefix("nearest of the 2,002 known tasks: ").partition("; ")
    assert near.split(", ")[0] == tasks[123]
    assert 2 <= len(near.split(", ")) <= 5
    assert rest == "for all see GET /list"
    assert known_tasks("Vqa", tasks, "GET /list").startswith("nearest of the 2,002 known tasks: vqa, VQA-2;")
    assert known_tasks("zzz", tasks, "GET /list") == (
        "none of the 2,002 known tasks has a similar name; for all see GET /list"
    )


def test_an_unknown_task_of_a_large_store(tmp_path: Path) -> None:
    for i in range(9):
        save_profile(make(f"task-{i}"), tmp_path / f"task-{i}.safetensors")
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(RoutingError, match=r"'task-3x'; nearest of the 10 known tasks: task-3, ") as caught:
        ProfileStore(tmp_path).get("task-3x")
    assert str(caught.value).endswith(f"; for all see the folder {tmp_path}")
    assert "other" not in str(caught.value)


def test_an_empty_store(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    assert store.names() == []
    with pytest.raises(RoutingError, match="known tasks: none yet"):
        store.get("vqa")


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no such folder"):
        ProfileStore(tmp_path / "missing")


@pytest.mark.parametrize("name", ["../vqa", "a/b", "/etc/passwd", "", ".", "none", "vqa\0", "a" * 65])
def test_what_is_no_task_name_never_becomes_a_path(folder: Path, name: str) -> None:
    save_profile(VQA, folder.parent / "vqa.safetensors")
    store = ProfileStore(folder)
    for ask in (store.path, store.get):
        with pytest.raises(RoutingError, match="is not a task name"):
            ask(name)


def test_a_symlink_that_leaves_the_store_is_refused(folder: Path) -> None:
    outside = folder.parent / "profiles-elsewhere"  # the store's path is a prefix of it
    outside.mkdir()
    save_profile(make("cap"), outside / "cap.safetensors")
    (folder / "cap.safetensors").symlink_to(outside / "cap.safetensors")
    (folder / "deep").symlink_to(outside)
    (folder / "chain.safetensors").symlink_to(folder / "deep" / "cap.safetensors")
    store = ProfileStore(folder)
    for name in ("cap", "chain"):
        with pytest.raises(ProfileError, match=rf"{name}\.safetensors: leaves the store"):
            store.get(name)


def test_symlinks_within_and_to_the_store_are_fine(folder: Path) -> None:
    (folder / "versions").mkdir()
    (folder / "vqa.safetensors").rename(folder / "versions" / "vqa-2.safetensors")
    (folder / "vqa.safetensors").symlink_to(folder / "versions" / "vqa-2.safetensors")
    (folder.parent / "current").symlink_to(folder)
    assert ProfileStore(folder.parent / "current").get("vqa") == VQA


def test_a_broken_file_is_listed_and_reported(folder: Path) -> None:
    (folder / "cap.safetensors").write_bytes(b"broken")
    store = ProfileStore(folder)
    assert store.names() == ["cap", "ocr", "vqa"]
    with pytest.raises(ProfileError, match=r"cap\.safetensors: not a safetensors file"):
        store.get("cap")
    assert store.get("vqa") == VQA


def test_a_file_that_holds_another_task(folder: Path) -> None:
    save_profile(VQA, folder / "cap.safetensors")
    with pytest.raises(ProfileError, match=r"cap\.safetensors: holds the task 'vqa'"):
        ProfileStore(folder).get("cap")
