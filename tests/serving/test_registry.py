"""The profiles that a server knows, their replacement, and the requests that use them."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from hones_serving.expert_room import ExpertRoom, RoomError
from hones_serving.registry import CapacityError, ProfileRegistry, label_of

from hones_steer import MismatchError, ModelIdentity, Profile, ProfileError, RoutingError, StateError, save_profile
from hones_steer.ffns import FfnRun
from hones_steer.store import parse_expression

IDENTITY = ModelIdentity("", None, "llama", 2, 8, 32, tuple(1.0 + i for i in range(16)))


def profile(task, scale=2.0, identity=IDENTITY, **metadata):
    layers = {1: (np.array([0, 5], np.int32), np.array([scale, 0.5], np.float32))}
    return Profile(task, layers, identity, **metadata)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "profiles").mkdir()
    for task, scale in (("vqa", 2.0), ("ocr", 3.0), ("cap", 4.0)):
        save_profile(profile(task, scale, description=f"for {task}"), tmp_path / "profiles" / f"{task}.safetensors")
    return tmp_path / "profiles"


def registry(folder, max_profiles=8, always_enough=False):
    return ProfileRegistry(folder, IDENTITY, max_profiles=max_profiles, always_enough=always_enough)


def resolved(known, text):
    return known.resolve(parse_expression(text))


# Reading


def test_it_knows_every_profile_of_the_folder(folder):
    known = registry(folder)
    assert known.tasks() == ["cap", "ocr", "vqa"]
    assert known.profiles()[2] == {
        "name": "vqa",
        "digest": profile("vqa", 2.0).digest,
        "neurons": 2,
        "layers": 1,
        "description": "for vqa",
        "file": "vqa.safetensors",
    }


def test_an_empty_folder_is_a_server_without_tasks_yet(tmp_path):
    known = registry(tmp_path)
    assert known.tasks() == []
    with pytest.raises(RoutingError, match="no profile for the task 'vqa'; known tasks: none yet"):
        resolved(known, "vqa")


def test_no_server_without_its_folder(tmp_path):
    with pytest.raises(ProfileError, match="no such folder"):
        registry(tmp_path / "missing")


def test_no_server_with_a_broken_profile(folder):
    (folder / "bad.safetensors").write_bytes(b"junk")
    with pytest.raises(ProfileError, match=r"bad\.safetensors.*not a safetensors file"):
        registry(folder)


def test_no_server_with_a_profile_of_another_model(folder):
    another_model = ModelIdentity("", None, "llama", 2, 8, 32, (5.0,) * 16)
    save_profile(profile("vqa", identity=another_model), folder / "vqa.safetensors")
    with pytest.raises(MismatchError, match=r"vqa\.safetensors: the profile belongs to another model.*made for$"):
        registry(folder)


def test_no_server_with_a_profile_of_experts_for_a_dense_model(folder):
    mixture = replace(IDENTITY, intermediate_size=None, ffns=(FfnRun(0, 2, experts=4, expert_width=8),))
    scaled = {(1, 3): (np.array([0], np.int32), np.array([2.0], np.float32))}
    save_profile(Profile("vqa", scaled, mixture), folder / "vqa.safetensors")
    message = r"vqa\.safetensors: .*layer 0 has 4 experts of 8 neurons in the profile and a dense FFN of 8 neurons"
    with pytest.raises(MismatchError, match=message):
        registry(folder)


@pytest.mark.parametrize("name", ["my task", "none", "._vqa"])
def test_no_server_that_skips_a_file(folder, name):
    (folder / f"{name}.safetensors").write_bytes((folder / "vqa.safetensors").read_bytes())
    with pytest.raises(ProfileError, match="no task can have this name"):
        registry(folder)


# Expressions


def test_an_expression_becomes_the_profile_it_describes(folder):
    known = registry(folder)
    assert resolved(known, "vqa") == profile("vqa", 2.0)
    assert resolved(known, "vqa@0.5+ocr") == profile("vqa", 2.0) * 0.5 + profile("ocr", 3.0)
    assert resolved(known, "none") is None
    assert resolved(known, "vqa@0") is None
    assert resolved(known, "vqa+vqa@-1") is None


def test_an_unknown_task_is_an_error_wherever_it_stands(folder):
    known = registry(folder)
    for text in ("nope", "vqa+nope", "nope@0"):
        with pytest.raises(RoutingError, match="no profile for the task 'nope'; known tasks: cap, ocr, vqa"):
            resolved(known, text)


def test_an_unknown_task_of_many_is_not_answered_with_all_of_them(folder):
    for i in range(100):
        save_profile(profile(f"tenant-{i}"), folder / f"tenant-{i}.safetensors")
    known = registry(folder)
    message = (
        r"the task 'tenant-77x'; nearest of the 103 known tasks: tenant-77, .*; for all see GET /v1/hones/profiles"
    )
    with pytest.raises(RoutingError, match=message) as caught:
        resolved(known, "tenant-77x")
    assert len(str(caught.value)) < 300
    with pytest.raises(RoutingError, match="to unload; nearest of the 103 known tasks: tenant-77, ") as caught:
        known.unload("tenant-77x")
    assert len(str(caught.value)) < 300


def test_scales_beyond_the_format_are_the_clients_error(folder):
    save_profile(profile("big", 90.0), folder / "big.safetensors")
    with pytest.raises(RoutingError, match="scales beyond 100"):
        resolved(registry(folder), "big@2")


def test_a_blend_is_computed_once_for_the_same_contents(folder):
    known = registry(folder)
    first = resolved(known, "vqa+ocr")
    assert resolved(known, "ocr+vqa") is first
    save_profile(profile("ocr", 7.0), folder / "new.safetensors")
    known.load("ocr", "new.safetensors")
    assert resolved(known, "vqa+ocr") == profile("vqa", 2.0) + profile("ocr", 7.0)


def test_contents_that_change_their_names_are_not_mixed_up(folder):
    known = registry(folder)
    assert resolved(known, "cap@0+ocr") == profile("ocr", 3.0)
    # Now the same two contents stand under the names ocr and vqa.
    known.load("vqa", "ocr.safetensors")
    known.load("ocr", "cap.safetensors")
    assert resolved(known, "ocr+vqa@0") == profile("cap", 4.0)


def test_profiles_that_each_fit_the_model_can_be_mixed(folder):
    for task, factor in (("low", 0.9905), ("high", 1.0095)):
        sketch = tuple(factor * value for value in IDENTITY.sketch)
        another_model = ModelIdentity("", None, "llama", 2, 8, 32, sketch)
        save_profile(profile(task, identity=another_model), folder / f"{task}.safetensors")
    assert resolved(registry(folder), "low+high") is not None


@pytest.mark.parametrize(
    ("text", "label"),
    [("vqa", "vqa"), ("vqa@0.5+vqa", "vqa"), ("vqa+ocr", "blend"), ("none", "none"), ("vqa@0", "none"), ("a+b@0", "a")],
)
def test_the_label_is_the_task_without_its_strength(text, label):
    assert label_of(parse_expression(text)) == label


# Loading


def test_load_adds_and_replaces(folder):
    known = registry(folder)
    (folder / "sub").mkdir()
    save_profile(profile("vqa", 9.0, description="second"), folder / "sub" / "v2.safetensors")
    entry = known.load("vqa", "sub/v2.safetensors")
    assert entry in known.profiles()
    assert (entry["name"], entry["file"], entry["description"]) == ("vqa", "sub/v2.safetensors", "second")
    known.load("vqa-v2", str(folder / "sub" / "v2.safetensors"))
    assert known.tasks() == ["cap", "ocr", "vqa", "vqa-v2"]
    assert resolved(known, "vqa") == resolved(known, "vqa-v2") == profile("vqa", 9.0)


def test_a_changed_file_changes_nothing_by_itself(folder):
    known = registry(folder)
    save_profile(profile("vqa", 9.0), folder / "vqa.safetensors")
    assert resolved(known, "vqa") == profile("vqa", 2.0)


def test_nothing_outside_the_folder_is_read(folder):
    save_profile(profile("vqa", 9.0), folder.parent / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")
    (folder / "up").symlink_to(folder.parent)
    (folder.parent / "profiles-2").mkdir()
    save_profile(profile("vqa", 9.0), folder.parent / "profiles-2" / "vqa.safetensors")
    (folder / "link.safetensors").rename(folder / "link")  # or the folder would not load
    known = registry(folder)
    escapes = ["../outside.safetensors", str(folder.parent / "outside.safetensors"), "link", "up/outside.safetensors"]
    for path in [*escapes, "../profiles-2/vqa.safetensors", "/etc/passwd", ".."]:
        with pytest.raises(ProfileError, match="leaves the folder of profiles"):
            known.load("vqa", path)
    assert resolved(known, "vqa") == profile("vqa", 2.0)


def test_a_folder_reached_by_a_symlink_is_the_folder(folder):
    (folder.parent / "current").symlink_to(folder)
    known = registry(folder.parent / "current")
    assert known.load("vqa", "vqa.safetensors")["file"] == "vqa.safetensors"
    assert known.load("vqa", str(folder / "vqa.safetensors"))["file"] == "vqa.safetensors"


@pytest.mark.parametrize("path", ["", ".", "missing.safetensors", "a" * 5000, "nul\0", "half\ud800", "loop"])
def test_a_path_that_names_no_file_is_an_error_and_no_more(folder, path):
    (folder / "loop").symlink_to("loop")
    known = registry(folder)
    with pytest.raises(ProfileError):
        known.load("vqa", path)
    assert resolved(known, "vqa") == profile("vqa", 2.0)


def test_a_file_that_cannot_be_used_leaves_the_old_profile(folder):
    another_model = ModelIdentity("", None, "llama", 4, 8, 32, None)
    save_profile(profile("vqa", identity=another_model), folder / "other")
    (folder / "broken").write_bytes((folder / "vqa.safetensors").read_bytes()[:-1])
    known = registry(folder)
    with pytest.raises(MismatchError, match="num_layers is 4 in the profile and 2"):
        known.load("vqa", "other")
    with pytest.raises(ProfileError, match="broken"):
        known.load("vqa", "broken")
    assert resolved(known, "vqa") == profile("vqa", 2.0)


@pytest.mark.parametrize("name", ["none", "", "a+b", "../vqa", "vqa "])
def test_a_name_that_no_expression_can_hold_is_refused(folder, name):
    with pytest.raises(ProfileError, match="cannot name a task"):
        registry(folder).load(name, "vqa.safetensors")


def test_unload_forgets_the_name_and_keeps_the_file(folder):
    known = registry(folder)
    known.unload("vqa")
    assert known.tasks() == ["cap", "ocr"]
    assert (folder / "vqa.safetensors").exists()
    with pytest.raises(RoutingError, match="no profile 'vqa' to unload; known tasks: cap, ocr"):
        known.unload("vqa")


# Who uses what


def test_the_same_content_takes_one_place(folder):
    known = registry(folder, max_profiles=1)
    vqa = resolved(known, "vqa")
    first, second = known.admit(vqa, "vqa"), known.admit(vqa, "vqa")
    unsteered = known.admit(None, "none")
    assert known.slots_used() == 1
    with pytest.raises(CapacityError, match="1 other profiles are in use"):
        known.admit(resolved(known, "ocr"), "ocr")
    known.leave(first)
    known.leave(first)  # once more changes nothing
    assert known.slots_used() == 1
    known.leave(second)
    known.leave(unsteered)
    assert known.slots_used() == 0
    known.admit(resolved(known, "ocr"), "ocr")


def test_what_was_refused_takes_no_place(folder):
    known = registry(folder, max_profiles=1)
    held = known.admit(resolved(known, "vqa"), "vqa")
    with pytest.raises(CapacityError):
        known.admit(resolved(known, "ocr"), "ocr")
    with pytest.raises(CapacityError):
        known.hold(resolved(known, "ocr").digest)
    known.leave(held)
    assert known.slots_used() == 0


def test_requests_inside_the_engine_count_too(folder):
    known = registry(folder, max_profiles=1)
    vqa = resolved(known, "vqa")
    admission = known.admit(vqa, "vqa")
    known.hold(vqa.digest)
    known.leave(admission)  # the client has gone, the engine has not noticed yet
    assert known.slots_used() == 1
    with pytest.raises(CapacityError):
        known.hold(resolved(known, "ocr").digest)
    known.release(vqa.digest)
    assert known.slots_used() == 0
    with pytest.raises(StateError, match="nothing holds"):
        known.release(vqa.digest)


def test_an_engine_with_room_for_all_turns_nobody_away(folder):
    known = registry(folder, max_profiles=1, always_enough=True)
    for task in known.tasks():
        known.admit(resolved(known, task), task)
    assert known.slots_used() == 3


def test_equal_admissions_are_two_and_each_leaves_once(folder):
    known = registry(folder)
    first, second = (known.admit(resolved(known, "vqa"), "vqa") for _ in range(2))
    known.leave(first)
    known.leave(first)
    assert (known.in_flight(), known.slots_used()) == (1, 1)
    known.leave(second)
    assert (known.in_flight(), known.slots_used()) == (0, 0)


def test_who_was_admitted_keeps_the_profile_of_then(folder):
    known = registry(folder, max_profiles=2)
    before = known.admit(resolved(known, "vqa"), "vqa")
    save_profile(profile("vqa", 9.0), folder / "vqa.safetensors")
    known.load("vqa", "vqa.safetensors")
    after = known.admit(resolved(known, "vqa"), "vqa")
    known.unload("vqa")
    assert (before.profile, after.profile) == (profile("vqa", 2.0), profile("vqa", 9.0))
    assert known.slots_used() == 2


def test_threads_never_get_more_room_than_there_is(folder):
    known = registry(folder, max_profiles=2)
    contents = [resolved(known, task) for task in known.tasks()]
    most, start = [], threading.Barrier(6)

    def work(seed):
        start.wait()
        for i in range(100):
            try:
                admission = known.admit(contents[(seed + i) % 3], "x")
            except CapacityError:
                continue
            most.append(known.slots_used())
            known.leave(admission)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most
    assert max(most) <= 2
    assert known.slots_used() == 0


# Room for experts

MIXTURE = replace(IDENTITY, intermediate_size=None, ffns=(FfnRun(0, 2, experts=8, expert_width=4, shared=6),))
LAYERS = frozenset(range(2))


def of_experts(*experts, scale=2.0):
    """A profile of the shared expert of layer 0 and of routed experts, each (layer, number)."""
    row = np.array([1], np.int32), np.array([scale], np.float32)
    return Profile("vqa", dict.fromkeys([(0, "shared"), *experts], row), MIXTURE)


def of_mixture(folder, *rooms, **profiles):
    """A registry whose workers have `rooms`, and the `profiles` with these names."""
    folder.mkdir(exist_ok=True)
    for name, each in profiles.items():
        save_profile(replace(each, task=name), folder / f"{name}.safetensors")
    return ProfileRegistry(folder, MIXTURE, max_profiles=8, always_enough=False, rooms=rooms)


def test_profiles_that_list_the_same_experts_share_their_room(tmp_path):
    one, both = of_experts((0, 1)), of_experts((0, 1), (1, 1))
    known = of_mixture(tmp_path, ExpertRoom(2, frozenset(range(8)), LAYERS), one=one, both=both)
    save_profile(of_experts((0, 1), scale=5.0), tmp_path / "one.safetensors")
    known.load("again", "one.safetensors")
    save_profile(of_experts(), tmp_path / "shared.safetensors")
    known.load("shared", "shared.safetensors")
    assert known.tasks() == ["again", "both", "one", "shared"]


def test_a_profile_that_needs_more_room_is_refused_and_nothing_changes(tmp_path):
    known = of_mixture(
        tmp_path, ExpertRoom(2, frozenset(range(8)), LAYERS), one=of_experts((0, 1)), two=of_experts((1, 1))
    )
    before = known.profiles()
    save_profile(of_experts((0, 2)), tmp_path / "more.safetensors")
    with pytest.raises(RoomError, match=r"list neurons of 3 experts .* tables for 2; .*--max-expert-tables 3"):
        known.load("new", "more.safetensors")
    assert known.profiles() == before
    known.load("one", "more.safetensors")  # in place of another


def test_profiles_that_requests_still_use_keep_their_room(tmp_path):
    known = of_mixture(tmp_path, ExpertRoom(1, frozenset(range(8)), LAYERS), one=of_experts((0, 1)))
    admission = known.admit(resolved(known, "one@0.5"), "one")
    save_profile(of_experts((0, 2)), tmp_path / "other.safetensors")
    with pytest.raises(RoomError, match="of 2 experts"):
        known.load("one", "other.safetensors")
    known.leave(admission)
    known.load("one", "other.safetensors")


def test_each_worker_needs_room_for_its_own_experts(tmp_path):
    rooms = ExpertRoom(1, frozenset(range(4)), LAYERS), ExpertRoom(1, frozenset(range(4, 8)), LAYERS)
    known = of_mixture(tmp_path, *rooms, low=of_experts((0, 1)), high=of_experts((0, 5)))
    save_profile(of_experts((1, 5)), tmp_path / "high.safetensors")
    with pytest.raises(RoomError):
        known.load("more", "high.safetensors")
    known.load("high", "high.safetensors")


def test_each_pipeline_stage_needs_room_for_its_own_layers(tmp_path):
    rooms = (ExpertRoom(1, frozenset(range(8)), frozenset({layer})) for layer in LAYERS)
    known = of_mixture(tmp_path, *rooms, first=of_experts((0, 1)), second=of_experts((1, 1)))
    save_profile(of_experts((1, 5)), tmp_path / "second.safetensors")
    with pytest.raises(RoomError):
        known.load("more", "second.safetensors")
    known.load("second", "second.safetensors")


def test_a_server_without_room_for_its_profiles_does_not_start(tmp_path):
    with pytest.raises(RoomError, match="of 2 experts together, but a worker has tables for 1"):
        of_mixture(tmp_path, ExpertRoom(1, frozenset(range(8)), LAYERS), one=of_experts((0, 1), (1, 1)))
