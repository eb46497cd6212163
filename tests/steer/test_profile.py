"""The profile as a value, its bytes, its digest, its algebra, and its tie to a model."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from steer.profiles import identity, make, make_layers, profiles, rows, scales_of
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from hones_steer import MismatchError, ModelIdentity, Profile, ProfileError, load_profile, save_profile
from hones_steer.profile import CREATED_WITH, file_sha256, parse_profile, serialize_profile

GOLDEN = Path(__file__).parent / "golden" / "vqa.safetensors"
GOLDEN_DIGEST = "8dbae6cb4d5dd7d0eaff18781e82fe23e648384274115a83ad54744683a2c387"


def golden() -> Profile:
    return Profile(
        task="vqa",
        layers={
            11: (np.array([2, 3], np.int32), np.array([0.0, -1.5], np.float32)),
            2: (np.array([0, 17, 31], np.int32), np.array([0.5, 1.25, 100.0], np.float32)),
        },
        base_model=ModelIdentity("org/model", "0123abc", "llava", 12, 32, 64, tuple(i / 8 for i in range(16))),
        description="Frage → Antwort",
        license="Apache-2.0",
        method={"name": "hones", "top_fraction": 0.01, "seed": 3407},
        evidence={"test": {"n": 300, "metric": "vqa_accuracy", "base": 0.652, "hones": 0.673}},
        created_with="hones-steer 0.1",
    )


# Bytes --------------------------------------------------------------------------------------------


def test_golden_bytes_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "vqa.safetensors"
    save_profile(golden(), path)
    assert path.read_bytes() == GOLDEN.read_bytes()
    assert golden().digest == GOLDEN_DIGEST
    assert load_profile(GOLDEN).digest == GOLDEN_DIGEST
    assert golden().short_digest == GOLDEN_DIGEST[:12]


def test_the_digest_is_what_the_format_says() -> None:
    content = struct.pack("<i", 1)
    content += struct.pack("<2i", 2, 3) + struct.pack("<3i", 0, 17, 31) + struct.pack("<3f", 0.5, 1.25, 100.0)
    content += struct.pack("<2i", 11, 2) + struct.pack("<2i", 2, 3) + struct.pack("<2f", 0.0, -1.5)
    assert golden().digest == hashlib.sha256(content).hexdigest()


def test_any_safetensors_reader_can_read_a_profile() -> None:
    with safe_open(GOLDEN, framework="numpy") as file:
        assert file.metadata().keys() == {"hones_steer"}
        metadata = json.loads(file.metadata()["hones_steer"])
        assert list(metadata) == sorted(metadata)
        assert metadata["format"] == 1
        assert metadata["evidence"]["test"]["n"] == 300
        assert file.get_tensor("layers.11.neurons").tolist() == [2, 3]
        assert file.get_tensor("layers.11.scales").dtype == np.float32


@given(profiles())
def test_write_then_read_gives_the_same_value(profile: Profile) -> None:
    data = serialize_profile(profile)
    back = parse_profile(data)
    assert back == profile
    assert hash(back) == hash(profile)
    assert scales_of(back) == scales_of(profile)
    for field in dataclasses.fields(Profile):
        if field.name != "layers":
            assert getattr(back, field.name) == getattr(profile, field.name)
    assert serialize_profile(back) == data


@given(rows())
def test_the_same_profile_is_the_same_bytes_however_it_was_built(scales: dict[int, dict[int, float]]) -> None:
    backwards = dict(reversed(scales.items()))
    one = make(scales=scales, method={"a": 1, "b": 2})
    other = make(scales=backwards, method={"b": 2, "a": 1})
    assert serialize_profile(one) == serialize_profile(other)
    assert one.digest == other.digest


def test_bytes_are_the_same_in_every_process() -> None:
    script = (
        "import hashlib; from hones_steer.profile import *;"
        f"print(hashlib.sha256(serialize_profile(load_profile({str(GOLDEN)!r}))).hexdigest())"
    )
    for seed in ("1", "2"):
        command = [sys.executable, "-c", script]
        result = subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == file_sha256(GOLDEN)


def test_the_writer_of_a_file_is_kept() -> None:
    profile = dataclasses.replace(golden(), created_with="another-tool 7")
    assert parse_profile(serialize_profile(profile)).created_with == "another-tool 7"
    assert make().created_with == CREATED_WITH


@given(profiles(), profiles())
@settings(max_examples=20)
def test_the_digest_sees_content_only(profile: Profile, other: Profile) -> None:
    redescribed = dataclasses.replace(other, layers=profile.layers)
    assert redescribed.digest == profile.digest
    assert (redescribed == profile) == (other.base_model == profile.base_model)


def test_the_digest_sees_every_part_of_the_content() -> None:
    variants = [
        {1: {0: 0.5, 7: 1.5}, 3: {4: -2.0}},
        {1: {0: 0.5, 7: 1.5}, 2: {4: -2.0}},
        {1: {0: 0.5, 8: 1.5}, 3: {4: -2.0}},
        {1: {0: 0.5, 7: 1.5}, 3: {4: 2.0}},
        {1: {0: 0.5, 7: 1.5}},
    ]
    assert len({make(scales=scales).digest for scales in variants}) == len(variants)


def test_negative_zero_is_zero() -> None:
    assert make(scales={1: {0: -0.0}}).digest == make(scales={1: {0: 0.0}}).digest


def test_profiles_of_different_models_are_not_equal() -> None:
    one, other = make(), make(base_model=identity(model_type="llama"))
    assert one.digest == other.digest
    assert one != other
    assert one != "vqa"


# The value ----------------------------------------------------------------------------------------


def test_a_profile_is_immutable_and_keeps_copies() -> None:
    layers, evidence = make_layers({3: {1: 0.5}, 1: {2: 1.5}}), {"test": {"n": 300}}
    profile = Profile(task="vqa", layers=layers, base_model=identity(), evidence=evidence)
    layers[3][1][0] = 9.0
    evidence["test"]["n"] = 1
    assert scales_of(profile) == {(1, 2): 1.5, (3, 1): 0.5}
    assert profile.evidence == {"test": {"n": 300}}
    assert list(profile.layers) == [1, 3]
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.task = "ocr"
    with pytest.raises(TypeError):
        profile.layers[2] = profile.layers[1]
    for array in profile.layers[1]:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.setflags(write=True)


def test_counts_and_repr() -> None:
    assert make().num_neurons == 3
    assert repr(make()) == f"<Profile vqa {make().short_digest}: 3 neurons in 2 layers of llava>"


@given(profiles())
@settings(max_examples=20)
def test_copies_and_pickles_are_equal(profile: Profile) -> None:
    for twin in (copy.deepcopy(profile), pickle.loads(pickle.dumps(profile))):
        assert serialize_profile(twin) == serialize_profile(profile)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "none"}, "task 'none' is not a valid name"),
        ({"task": ".hidden"}, "not a valid name"),
        ({"description": 3}, "description is 3, not a string"),
        ({"base_model": {}}, "base_model is a dict; give a ModelIdentity"),
        ({"layers": {}}, "there are no layers"),
        ({"layers": []}, "layers is a list"),
        ({"layers": {True: make().layers[1]}}, "layer True is not an integer"),
        ({"layers": {"1": make().layers[1]}}, "layer '1' is not an integer"),
        ({"layers": {6: make().layers[1]}}, "layer 6 does not exist: the model has layers 0 to 5"),
        ({"layers": {-1: make().layers[1]}}, "layer -1 does not exist"),
        ({"layers": {1: None}}, "layer 1: give a pair"),
        ({"layers": {1: ([0], [1.0])}}, "layers.1.neurons is a list; give a numpy array of dtype int32"),
        ({"layers": {1: (np.array([0]), np.ones(1, np.float32))}}, "layers.1.neurons has dtype int64"),
        ({"layers": {1: (np.array([0], np.int32), np.ones(1))}}, "layers.1.scales has dtype float64"),
        ({"layers": {1: (np.array([40], np.int32), np.ones(1, np.float32))}}, "contains 40, outside 0 to 39"),
        ({"method": {1: 2}}, "a key of method is 1, not a string"),
        ({"method": []}, r"method is \[\], not a JSON object"),
        ({"evidence": {"n": 2**63}}, "evidence.n is an integer beyond 64 bits"),
        ({"evidence": {"n": -(2**63) - 1}}, "evidence.n is an integer beyond 64 bits"),
        ({"evidence": {"n": np.int64(3)}}, "evidence.n is a int64; give plain JSON values"),
        ({"evidence": {"runs": [{"accuracy": float("nan")}]}}, r"evidence.runs\[0\].accuracy is nan"),
    ],
)
def test_a_bad_value_is_refused_like_a_bad_file(fields: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"task": "vqa", "layers": make().layers, "base_model": identity()}
    with pytest.raises(ProfileError, match=message):
        Profile(**(values | fields))


def test_numpy_layer_numbers_are_accepted() -> None:
    profile = Profile(task="vqa", layers={np.int64(1): make().layers[1]}, base_model=identity())
    assert [type(layer) for layer in profile.layers] == [int]


# Algebra ------------------------------------------------------------------------------------------


@given(rows(49), rows(49))
def test_addition_commutes(a: dict[int, dict[int, float]], b: dict[int, dict[int, float]]) -> None:
    one, other = make("a", a), make("b", b)
    assert one + other == other + one
    assert (one + other).task == "a"


@given(rows(10), rows(10))
def test_a_sum_adds_offsets(a: dict[int, dict[int, float]], b: dict[int, dict[int, float]]) -> None:
    one, other = scales_of(make("a", a)), scales_of(make("b", b))
    total = scales_of(make("a", a) + make("b", b))
    assert total.keys() == one.keys() | other.keys()
    for neuron, scale in total.items():
        assert scale == pytest.approx(1 + (one.get(neuron, 1) - 1) + (other.get(neuron, 1) - 1), abs=1e-5)


@given(rows(10), st.floats(-2, 2), st.floats(-2, 2))
def test_scaling_twice_is_scaling_once(scales: dict[int, dict[int, float]], x: float, y: float) -> None:
    profile = make(scales=scales)
    twice, once = scales_of(profile * x * y), scales_of(profile * (x * y))
    assert twice.keys() == once.keys()
    np.testing.assert_allclose(list(twice.values()), list(once.values()), atol=1e-4)


@given(rows())
def test_the_neutral_strengths(scales: dict[int, dict[int, float]]) -> None:
    profile = make(scales=scales)
    assert 1 * profile == profile
    assert profile * 1.0 == profile
    assert set(scales_of(profile * 0).values()) == {1.0}
    assert set(scales_of(profile - profile).values()) == {1.0}
    assert (profile - profile).num_neurons == profile.num_neurons


def test_what_a_derived_profile_says_about_itself() -> None:
    a = make("a", license="MIT", evidence={"test": {"n": 3}})
    b = make("b", {0: {1: 2.0}}, license="CC-BY-4.0")
    total = a + b * 0.5
    assert total.task == "a"
    assert total.description == "a + b"
    assert total.license == "CC-BY-4.0 AND MIT"
    assert total.evidence == {}
    assert [term["digest"] for term in total.method["terms"]] == [a.digest, (b * 0.5).digest]
    assert parse_profile(serialize_profile(total)) == total


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), np.float32("-inf")])
def test_a_strength_must_be_finite(strength: float) -> None:
    with pytest.raises(ProfileError, match="give a finite number"):
        make() * strength


@pytest.mark.parametrize("strength", [1e3, -1e30, 1e308])
def test_scales_beyond_the_limit_are_refused(strength: float) -> None:
    with pytest.raises(ProfileError, match="scales must be"):
        make() * strength


@pytest.mark.parametrize("other", ["ocr", None, True])
def test_only_numbers_scale_and_only_profiles_add(other: Any) -> None:
    for operation in (lambda: make() * other, lambda: make() + other, lambda: make() - other):
        with pytest.raises(TypeError):
            operation()


@pytest.mark.parametrize(
    "change", [{"num_layers": 7}, {"hidden_size": 64}, {"model_type": "llama"}, {"sketch": (2.0,) * 16}]
)
def test_profiles_of_different_models_do_not_add(change: dict[str, Any]) -> None:
    with pytest.raises(MismatchError, match="profiles of different models cannot be combined"):
        make() + make(base_model=identity(**change))


def test_a_models_name_and_revision_do_not_hinder_adding() -> None:
    assert (make() + make(base_model=identity(name="", revision="abc"))).base_model == identity()


# Writing ------------------------------------------------------------------------------------------


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "vqa.safetensors"
    for profile in (make(), make() * 0.5):
        save_profile(profile, path)
        assert load_profile(path) == profile
        assert list(tmp_path.iterdir()) == [path]


def test_a_saved_file_has_the_usual_permissions(tmp_path: Path) -> None:
    path, ordinary = tmp_path / "vqa.safetensors", tmp_path / "ordinary"
    save_profile(make(), path)
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"vqa\.safetensors: cannot be written: No such file or directory"):
        save_profile(make(), tmp_path / "missing" / "vqa.safetensors")


def run_writer(folder: Path, prelude: str) -> subprocess.CompletedProcess[str]:
    """Overwrite `folder`/vqa.safetensors in a process of its own, after `prelude`."""
    script = f"import os, resource, signal\nfrom hones_steer.profile import *\n{prelude}\n"
    script += f"profile = load_profile({str(folder / 'vqa.safetensors')!r}) * 0.5\n"
    script += f"save_profile(profile, {str(folder / 'vqa.safetensors')!r})\n"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_the_writer_process_does_write(tmp_path: Path) -> None:
    save_profile(make(), tmp_path / "vqa.safetensors")
    assert run_writer(tmp_path, "").returncode == 0
    assert load_profile(tmp_path / "vqa.safetensors") == make() * 0.5


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "vqa.safetensors"
    save_profile(make(), path)
    # Beyond 100 bytes the kernel refuses to write: a real error, as on a full disk.
    limit = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"
    result = run_writer(tmp_path, limit)
    assert f"ProfileError: {path}: cannot be written: File too large" in result.stderr
    assert load_profile(path) == make()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_before_the_rename_keeps_the_old_file(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "vqa.safetensors"
    save_profile(make(), path)
    result = run_writer(tmp_path, f"os.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)")
    assert result.returncode == -signal.SIGKILL
    assert load_profile(path) == make()
    assert [left.suffix for left in tmp_path.iterdir() if left != path] == [".tmp"]


# The model ----------------------------------------------------------------------------------------


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.uniform_(model.model.norm.weight, 0.5, 2.0)
    return model


def test_the_identity_of_a_model() -> None:
    model = tiny_llama()
    weight = model.model.norm.weight.detach().numpy()
    assert ModelIdentity.from_model(model) == ModelIdentity(
        name="",
        revision=None,
        model_type="llama",
        num_layers=3,
        intermediate_size=48,
        hidden_size=32,
        sketch=tuple(float(value) for value in weight[::2]),
    )


def test_the_sketch_of_gemma_is_the_stored_weight() -> None:
    config = Gemma3TextConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        vocab_size=64,
    )
    model = Gemma3ForCausalLM(config)
    torch.nn.init.uniform_(model.model.norm.weight, -0.5, 0.5)
    weight = model.model.norm.weight.detach().numpy()
    assert ModelIdentity.from_model(model).sketch == tuple(float(weight[i * 24 // 16]) for i in range(16))


def test_a_model_that_is_not_in_memory_has_no_sketch() -> None:
    assert ModelIdentity.from_model(tiny_llama().to("meta")).sketch is None


def test_a_hub_name_is_kept_and_a_folder_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    for name, expected in {"org/tiny": "org/tiny", "tiny": "tiny", str(tmp_path): "", "./a": "", "a/b/c": ""}.items():
        model.config._name_or_path = name
        assert ModelIdentity.from_model(model).name == expected
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model.config._name_or_path = "org/tiny"
    assert ModelIdentity.from_model(model).name == ""


def test_the_sketch_survives_bfloat16_and_tells_another_model() -> None:
    model = tiny_llama()
    profile_side = ModelIdentity.from_model(model)
    profile_side.check(ModelIdentity.from_model(model.to(torch.bfloat16)))
    with pytest.raises(MismatchError, match="final norm's weight"):
        profile_side.check(ModelIdentity.from_model(tiny_llama()))


def test_check_ignores_where_the_model_came_from() -> None:
    identity().check(identity(name="", revision="abc"))


@pytest.mark.parametrize("field", ["num_layers", "intermediate_size", "hidden_size"])
@pytest.mark.parametrize("allow_mismatch", [False, True])
def test_shapes_must_match_always(field: str, allow_mismatch: bool) -> None:
    theirs = identity(**{field: 99})
    message = f"{field} is {getattr(identity(), field)} in the profile and 99 in the model; .*org/tiny"
    with pytest.raises(MismatchError, match=message):
        identity().check(theirs, allow_mismatch=allow_mismatch)


def test_another_model_type_is_refused_unless_allowed() -> None:
    theirs = identity(model_type="llama")
    with pytest.raises(MismatchError, match=r"'llava' in the profile and 'llama' in the model.*allow_mismatch=True"):
        identity().check(theirs)
    identity().check(theirs, allow_mismatch=True)


@pytest.mark.parametrize(
    ("factor", "fits"), [(1.0, True), (1.0101, True), (0.9901, True), (0.9899, False), (1.01015, False), (-1.0, False)]
)
def test_the_sketchs_tolerance_is_one_percent_of_the_larger(factor: float, fits: bool) -> None:
    sketch = list(identity().sketch or ())
    sketch[5] *= factor
    theirs = identity(sketch=tuple(sketch))
    if fits:
        identity().check(theirs)
        return
    with pytest.raises(MismatchError, match=r"at position 10 is 1\.3125 in the profile and .*allow_mismatch=True"):
        identity().check(theirs)
    identity().check(theirs, allow_mismatch=True)


def test_without_a_sketch_there_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="the profile has no sketch"):
        identity(sketch=None).check(identity())
    with pytest.warns(UserWarning, match="the model has no sketch"):
        identity().check(identity(sketch=None))
