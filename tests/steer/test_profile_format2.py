"""Format 2: profiles of experts, and of dense FFNs of several widths. `test_profile.py` has what both formats share."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from steer.profiles import identity, make

from hones_steer import MismatchError, ModelIdentity, Profile, ProfileError, load_profile, save_profile
from hones_steer.cli import main
from hones_steer.ffns import Ffn, FfnRun
from hones_steer.profile import MAX_HEADER_BYTES, parse_profile, serialize_profile

GOLDEN = Path(__file__).parent / "golden" / "experts.safetensors"
GOLDEN_DIGEST = "504f481ff63c2e7fd04a76c628cfc7e6e9e73ddf74f2e341bb61d39b7a71c108"

RUNS = (FfnRun(0, 2, dense=40), FfnRun(3, 5, experts=8, expert_width=12, shared=24), FfnRun(5, 6, 20, 0, 4, 10))
WIDTHS = {(0, "dense"): 40, (1, "dense"): 40, (3, "shared"): 24, (4, "shared"): 24, (5, "dense"): 20}
WIDTHS |= {(layer, expert): 12 for layer in (3, 4) for expert in range(8)}
WIDTHS |= {(5, expert): 10 for expert in range(4)}
Rows = Mapping[Any, Mapping[int, float]]


def mixture(**changes: Any) -> ModelIdentity:
    return identity(**{"model_type": "qwen3_moe", "intermediate_size": None, "ffns": RUNS} | changes)


def arrays(row: Mapping[int, float]) -> tuple[Any, Any]:
    neurons = sorted(row)
    return np.array(neurons, np.int32), np.array([row[neuron] for neuron in neurons], np.float32)


def of_experts(rows: Rows, **fields: Any) -> Profile:
    """A profile of `{FFN: {neuron: scale}}`."""
    layers = {ffn: arrays(row) for ffn, row in rows.items()}
    return Profile(**{"task": "vqa", "layers": layers, "base_model": mixture()} | fields)


def rows_of(profile: Profile) -> dict[tuple[int, str | int], dict[int, float]]:
    return {
        tuple(ffn): dict(zip(neurons.tolist(), scales.tolist(), strict=True))
        for ffn, (neurons, scales) in profile.ffns.items()
    }


def any_rows(limit: float = 100.0) -> st.SearchStrategy[Rows]:
    scale = st.floats(-limit, limit, width=32).map(lambda value: value + 0.0)  # -0 is read as 0
    row = {
        ffn: st.dictionaries(st.integers(0, width - 1), scale, min_size=1, max_size=4) for ffn, width in WIDTHS.items()
    }
    some = st.sets(st.sampled_from(sorted(WIDTHS, key=str)), min_size=1, max_size=6)
    return some.flatmap(lambda ffns: st.fixed_dictionaries({ffn: row[ffn] for ffn in ffns}))


SOME: Rows = {
    (5, 3): {0: 2.0, 9: -0.5},
    (1, "dense"): {0: 0.5, 39: 100.0},
    (5, "dense"): {19: 0.0},
    (3, 7): {11: 1.25},
    (5, 0): {4: 3.0},
    (3, "shared"): {2: -1.5, 23: 1.5},
}


def golden() -> Profile:
    base_model = mixture(name="org/mixture", revision="0123abc", sketch=tuple(i / 8 for i in range(16)))
    return of_experts(
        SOME,
        base_model=base_model,
        description="Frage → Antwort",
        license="Apache-2.0",
        method={"name": "fisher", "seed": 3407},
        created_with="hones-steer 0.1",
    )


# Bytes --------------------------------------------------------------------------------------------


def test_golden_bytes_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    save_profile(golden(), path)
    assert path.read_bytes() == GOLDEN.read_bytes()
    assert load_profile(GOLDEN) == golden()
    assert load_profile(GOLDEN).digest == golden().digest == GOLDEN_DIGEST


def test_the_digest_is_what_the_format_says() -> None:
    content = struct.pack("<i", 2)
    content += struct.pack("<3i", 1, 0, 2) + struct.pack("<2i", 0, 39) + struct.pack("<2f", 0.5, 100.0)
    content += struct.pack("<3i", 3, 1, 2) + struct.pack("<2i", 2, 23) + struct.pack("<2f", -1.5, 1.5)
    content += struct.pack("<3i", 3, 2, 1) + struct.pack("<i", 7) + struct.pack("<i", 11) + struct.pack("<f", 1.25)
    content += struct.pack("<3i", 5, 0, 1) + struct.pack("<i", 19) + struct.pack("<f", 0.0)
    content += struct.pack("<3i", 5, 2, 3) + struct.pack("<3i", 0, 3, 3) + struct.pack("<3i", 4, 0, 9)
    content += struct.pack("<3f", 3.0, 2.0, -0.5)
    assert golden().digest == hashlib.sha256(content).hexdigest()


def test_any_safetensors_reader_can_read_it() -> None:
    with safe_open(GOLDEN, framework="numpy") as file:
        assert file.metadata().keys() == {"hones_steer"}
        metadata = json.loads(file.metadata()["hones_steer"])
        assert metadata["format"] == 2
        assert "intermediate_size" not in metadata["base_model"]
        assert metadata["base_model"]["ffns"] == [
            {"layers": [0, 2], "dense": 40},
            {"layers": [3, 5], "experts": [8, 12], "shared": 24},
            {"layers": [5, 6], "dense": 20, "experts": [4, 10]},
        ]
        assert file.get_tensor("layers.5.experts.index").tolist() == [0, 3, 3]
        assert file.get_tensor("layers.5.experts.neurons").tolist() == [4, 0, 9]
        assert len(file.keys()) == 2 + 5 + 5


@given(any_rows())
def test_write_then_read_gives_the_same_value(rows: Rows) -> None:
    profile = of_experts(rows)
    data = serialize_profile(profile)
    back = parse_profile(data)
    assert back == profile
    assert rows_of(back) == rows_of(profile) == dict(rows)
    assert serialize_profile(back) == data
    for twin in (copy.deepcopy(profile), pickle.loads(pickle.dumps(profile)), dataclasses.replace(profile)):
        assert serialize_profile(twin) == data


@given(any_rows())
def test_the_same_profile_is_the_same_bytes_however_it_was_built(rows: Rows) -> None:
    assert serialize_profile(of_experts(rows)) == serialize_profile(of_experts(dict(reversed(rows.items()))))


def test_the_digest_sees_every_part_of_the_content() -> None:
    variants: list[Rows] = [
        {(3, 1): {0: 0.5}},
        {(3, 2): {0: 0.5}},
        {(3, "shared"): {0: 0.5}},
        {(4, 1): {0: 0.5}},
        {(5, "dense"): {0: 0.5}},
        {(3, 1): {1: 0.5}},
        {(3, 1): {0: 0.25}},
        {(3, 1): {0: 0.5}, (3, 2): {0: 0.5}},
    ]
    assert len({of_experts(rows).digest for rows in variants}) == len(variants)


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    profile = dataclasses.replace(make(), description="a" * MAX_HEADER_BYTES)
    with pytest.raises(ProfileError, match="more than the 4 MiB allowed"):
        save_profile(profile, tmp_path / "vqa.safetensors")
    assert list(tmp_path.iterdir()) == []


# The value ----------------------------------------------------------------------------------------


def test_each_ffn_is_found_by_its_address() -> None:
    profile = golden()
    assert list(profile.ffns) == [(1, "dense"), (3, "shared"), (3, 7), (5, "dense"), (5, 0), (5, 3)]
    assert len(profile.ffns) == 6
    neurons, scales = profile.ffns[(5, 3)]
    assert (neurons.tolist(), scales.tolist()) == ([0, 9], [2.0, -0.5])
    assert profile.ffns[Ffn(1, "dense")][0].tolist() == [0, 39]
    for absent in [(5, 1), (5, "shared"), (5, "experts"), (0, "dense"), 1, (1, "dense", 0)]:
        assert absent not in profile.ffns
    assert (profile.num_neurons, profile.steered_layers) == (9, (1, 3, 5))
    assert repr(profile) == f"<Profile vqa {profile.short_digest}: 9 neurons in 3 layers of qwen3_moe>"
    with pytest.raises(ValueError, match="read-only"):
        scales[0] = 1


def test_layers_are_for_dense_profiles_only() -> None:
    for read in (dict, len, lambda layers: layers[1], lambda layers: 1 in layers):
        with pytest.raises(ProfileError, match="lists layer 3's shared expert, and `layers` has dense FFNs only"):
            read(golden().layers)
    dense = of_experts({(1, "dense"): {0: 0.5}, (5, "dense"): {19: 2.0}})
    assert {layer: neurons.tolist() for layer, (neurons, _) in dense.layers.items()} == {1: [0], 5: [19]}


def test_a_model_of_several_widths_has_format_2_and_is_used_like_any_other() -> None:
    wide = mixture(ffns=(FfnRun(0, 4, dense=40), FfnRun(4, 6, dense=80)))
    profile = Profile(task="a", layers={0: arrays({39: 2.0}), 5: arrays({79: 0.5})}, base_model=wide)
    assert (profile.format, parse_profile(serialize_profile(profile))) == (2, profile)
    assert list(profile.layers) == [0, 5]
    with pytest.raises(ProfileError, match=r"layers\.0\.neurons contains 40, outside 0 to 39"):
        Profile(task="a", layers={0: arrays({40: 2.0})}, base_model=wide)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({(3, 8): {0: 1.0}}, "layer 3 has no expert 8; it has 8 experts of 12 neurons and a shared one of 24"),
        ({(3, 1): {12: 1.0}}, r"layers\.3\.experts\.neurons contains 12, outside 0 to 11"),
        ({(0, 1): {0: 1.0}}, "layer 0 has no expert 1; it has a dense FFN of 40 neurons"),
        ({2: {0: 1.0}}, "layer 2 has no dense FFN; it has no FFN"),
        ({3: {0: 1.0}}, "layer 3 has no dense FFN; it has 8 experts"),
        ({(6, 1): {0: 1.0}}, "layer 6 does not exist: the model has layers 0 to 5"),
        ({(3, -1): {0: 1.0}}, "layer 3 has no FFN -1; give 'dense', 'shared' or the number of an expert"),
        ({(3, "experts"): {0: 1.0}}, "layer 3 has no FFN 'experts'; give"),
        ({(3, True): {0: 1.0}}, "layer 3 has no FFN True; give"),
        ({(3, 1, 2): {0: 1.0}}, r"layer \(3, 1, 2\) is not an integer"),
        ({(3, 1): {0: 101.0}}, "scales is 101.0 at neuron 0 of expert 1; scales must be at most 100"),
    ],
)
def test_what_the_model_does_not_have_is_refused(layers: Rows, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        of_experts(layers)


def test_a_dense_model_has_no_experts() -> None:
    with pytest.raises(ProfileError, match="layer 1 has no expert 0; it has a dense FFN of 40 neurons"):
        Profile("a", {(1, 0): arrays({0: 1.0})}, identity())


# Algebra ------------------------------------------------------------------------------------------


@given(any_rows(10), any_rows(10), st.floats(-2, 2))
def test_a_sum_adds_the_offsets_of_each_neuron_of_each_ffn(a: Rows, b: Rows, strength: float) -> None:
    total = rows_of(of_experts(a) + of_experts(b) * strength)
    assert {(ffn, i) for ffn, row in total.items() for i in row} == {
        (ffn, i) for rows in (a, b) for ffn, row in rows.items() for i in row
    }
    for ffn, row in total.items():
        for i, scale in row.items():
            offsets = a.get(ffn, {}).get(i, 1.0) - 1, strength * (b.get(ffn, {}).get(i, 1.0) - 1)
            assert scale == pytest.approx(1 + sum(offsets), abs=1e-5)


@given(any_rows())
def test_the_neutral_strengths(rows: Rows) -> None:
    profile = of_experts(rows)
    assert profile * 1.0 == profile
    assert {scale for row in rows_of(profile - profile).values() for scale in row.values()} == {1.0}


def test_profiles_of_both_formats_do_not_add() -> None:
    message = "layer 2 has a dense FFN of 40 neurons in the profile and no FFN in the other"
    with pytest.raises(MismatchError, match=message):
        make() + of_experts(SOME)


# The model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [identity(), identity(sketch=None), mixture()])
def test_an_identity_survives_json(model: ModelIdentity) -> None:
    assert ModelIdentity.from_json(json.loads(json.dumps(model.to_json()))) == model
    assert ("ffns" in model.to_json()) == (model.format == 2)


def test_counts_and_widths() -> None:
    model = mixture()
    assert model.num_neurons == 2 * 40 + 2 * (8 * 12 + 24) + 20 + 4 * 10
    assert {ffn: model.width(Ffn(*ffn)) for ffn in WIDTHS} == WIDTHS
    assert [model.width(Ffn(3, part)) for part in ("dense", "experts", 8)] == [0, 96, 0]
    assert model.describe_ffns() == (
        "6 layers (0 to 1: a dense FFN of 40 neurons; 3 to 4: 8 experts of 12 neurons and a shared one of 24; "
        "5 to 5: a dense FFN of 20 neurons and 4 experts of 10 neurons)"
    )


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (identity(), "layer 2 has no FFN in the profile and a dense FFN of 40 neurons in the model"),
        (
            mixture(ffns=(*RUNS[:2], FfnRun(5, 6, dense=20))),
            "layer 5 has a dense FFN of 20 neurons and 4 experts of 10",
        ),
        (
            mixture(ffns=(RUNS[0], FfnRun(3, 5, experts=8, expert_width=16, shared=24), RUNS[2])),
            "layer 3 has 8 experts of 12 neurons and a shared one of 24 in the profile and 8 experts of 16",
        ),
        (mixture(hidden_size=64), "hidden_size is 32 in the profile and 64 in the model"),
    ],
)
def test_a_model_with_other_ffns_is_refused(theirs: ModelIdentity, message: str) -> None:
    for profile_side, model_side in ((mixture(), theirs), (theirs, mixture())):
        with pytest.raises(MismatchError, match=message if model_side is theirs else "belongs to another model"):
            profile_side.check(model_side, allow_mismatch=True)


def test_an_identity_has_one_width_or_ffns() -> None:
    with pytest.raises(ProfileError, match="both intermediate_size and ffns"):
        mixture(intermediate_size=40)
    with pytest.raises(ProfileError, match="only dense FFNs of one width"):
        mixture(ffns=(FfnRun(0, 6, dense=40),))


# The command line ---------------------------------------------------------------------------------


def test_inspect_tells_what_is_in_experts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(GOLDEN)]) == 0
    text = capsys.readouterr().out
    assert "qwen3_moe, 6 layers (0 to 1: a dense FFN of 40 neurons; 3 to 4: 8 experts of 12" in text
    assert "9 of 380 (2.37%), in 3 of 6 layers" in text
    assert "4 in 3 routed experts, 2 in shared ones, 3 in dense FFNs" in text
    assert main(["inspect", str(GOLDEN), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["format"] == 2
    assert described["base_model"]["ffns"][2] == {"layers": [5, 6], "dense": 20, "experts": [4, 10]}
    assert described["layers"] == {"1": 2, "3": 3, "5": 4}
    assert described["ffns"] == {"dense": 3, "shared": 2, "experts": 4}


def test_diff_compares_neurons_of_the_same_ffn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = of_experts({**SOME, (5, 3): {0: 1.5}, (5, 2): {9: -0.5}}, base_model=golden().base_model)
    save_profile(other, tmp_path / "other.safetensors")
    assert main(["diff", str(GOLDEN), str(tmp_path / "other.safetensors"), "--json"]) == 1
    compared = json.loads(capsys.readouterr().out)
    assert compared["layers"][2] == {"layer": 5, "shared": 3, "rescaled": 1, "removed": 1, "added": 1}
    save_profile(make(), tmp_path / "dense.safetensors")
    assert main(["diff", str(GOLDEN), str(tmp_path / "dense.safetensors")]) == 1
    text = capsys.readouterr().out
    assert "base_model.ffns" in text
    assert "base_model.intermediate_size" in text
