"""Writes `attacks/`: one profile file per way a file can be broken, each wrong in exactly one respect.

    python tests/steer/make_attacks.py

The files are made of raw bytes, without hones_steer's writer, which would refuse most of them.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "attacks"


class Attack(NamedTuple):
    """The bytes of a broken file, and what the error message must say about it."""

    data: bytes
    message: str


class Tensor(NamedTuple):
    """A tensor as the safetensors header describes it."""

    dtype: str
    shape: list[int]
    data: bytes


class Bomb:
    """Raises when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


def int32(*values: int) -> Tensor:
    return Tensor("I32", [len(values)], struct.pack(f"<{len(values)}i", *values))


def float32(*values: float) -> Tensor:
    return Tensor("F32", [len(values)], struct.pack(f"<{len(values)}f", *values))


def sound_metadata() -> dict[str, Any]:
    return {
        "format": 1,
        "task": "vqa",
        "description": "a sound profile",
        "license": "Apache-2.0",
        "base_model": {
            "name": "",
            "revision": None,
            "model_type": "llava",
            "num_layers": 4,
            "intermediate_size": 32,
            "hidden_size": 16,
            "sketch": [1.0 + i / 16 for i in range(16)],
        },
        "method": {"name": "hones"},
        "evidence": {"test": {"n": 300}},
        "created_with": "hones-steer 0.1",
    }


def sound_tensors() -> dict[str, Tensor]:
    return {
        "layers.1.neurons": int32(0, 7, 31),
        "layers.1.scales": float32(0.5, 1.5, -2.0),
        "layers.3.neurons": int32(4, 5),
        "layers.3.scales": float32(1.25, 0.0),
    }


def header_bytes(text: str, body: bytes = b"") -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


def build(
    tensors: dict[str, Tensor] | None = None,
    metadata: str | None = None,
    entry: str | None = None,
) -> bytes:
    """Bytes of a safetensors file. `metadata` is the JSON text of our key, `entry` that of the whole `__metadata__`."""
    tensors = sound_tensors() if tensors is None else tensors
    metadata = json.dumps(sound_metadata(), sort_keys=True) if metadata is None else metadata
    entry = json.dumps({"hones_steer": metadata}) if entry is None else entry
    fields, body = [f'"__metadata__":{entry}'], b""
    for name, tensor in tensors.items():
        where = [len(body), len(body) + len(tensor.data)]
        described = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": where}
        fields.append(f"{json.dumps(name)}:{json.dumps(described)}")
        body += tensor.data
    return header_bytes("{" + ",".join(fields) + "}", body)


def with_metadata(**changes: Any) -> bytes:
    return build(metadata=json.dumps(sound_metadata() | changes, sort_keys=True))


def with_base_model(**changes: Any) -> bytes:
    return with_metadata(base_model=sound_metadata()["base_model"] | changes)


def with_tensors(**changes: Tensor | None) -> bytes:
    """The sound tensors with some replaced, named like `layers_1_scales`; None removes one."""
    named = {key.replace("_", "."): value for key, value in changes.items()}
    tensors = {**sound_tensors(), **{key: value for key, value in named.items() if value is not None}}
    return build({key: value for key, value in tensors.items() if named.get(key, value) is not None})


def renamed(old: str, new: str) -> bytes:
    return build({name.replace(old, new): tensor for name, tensor in sound_tensors().items()})


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in sound_metadata().items() if name != key}


def raw_metadata(old: str, new: str) -> bytes:
    text = json.dumps(sound_metadata(), sort_keys=True)
    assert text.count(old) == 1
    return build(metadata=text.replace(old, new))


def container_attacks() -> dict[str, Attack]:
    sound = build()
    quoted = json.dumps(json.dumps(sound_metadata(), sort_keys=True))
    header = '{"__metadata__":{"hones_steer":"{}"}'
    overlapping = sound.replace(b'"data_offsets": [12, 24]', b'"data_offsets": [ 0, 12]')
    return {
        "empty": Attack(b"", "too few for a header"),
        "pickle": Attack(pickle.dumps(Bomb(), protocol=0), "header claims"),
        "header_truncated": Attack(sound[:100], "header claims"),
        "header_length_huge": Attack(struct.pack("<Q", 2**63) + sound[8:], "header claims"),
        "header_not_utf8": Attack(header_bytes(header).replace(b"hones", b"\xff\xfe\xff\xfe\xff"), "not UTF-8"),
        "header_not_json": Attack(header_bytes("{not json}"), "header is not valid JSON"),
        "header_not_object": Attack(header_bytes("[1, 2]"), "header is not a JSON object"),
        "header_too_deep": Attack(header_bytes("[" * 100_000), "header is nested too deep"),
        "header_duplicate_tensor": Attack(
            sound.replace(b'"layers.3.neurons"', b'"layers.1.neurons"'), "duplicate key 'layers.1.neurons'"
        ),
        "header_tensor_not_object": Attack(
            header_bytes(f'{{"__metadata__":{{"hones_steer":{quoted}}},"layers.1.neurons":3}}'),
            "layers.1.neurons has dtype None, expected I32",
        ),
        "header_nan": Attack(header_bytes(header + ',"layers.1.neurons":NaN}'), "NaN is not a number"),
        "body_truncated": Attack(sound[:-4], "not a sound safetensors file"),
        "body_trailing": Attack(sound + b"\0\0\0\0", "not a sound safetensors file"),
        "body_overlapping": Attack(overlapping, "not a sound safetensors file"),
    }


def metadata_attacks() -> dict[str, Attack]:
    text = json.dumps(sound_metadata(), sort_keys=True)
    quoted = json.dumps(text)
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"a": deep}
    return {
        "metadata_missing": Attack(build(entry='{"format":"pt"}'), "not a steering profile"),
        "metadata_null": Attack(build(entry="null"), "not a steering profile"),
        "metadata_extra_key": Attack(build(entry=f'{{"hones_steer":{quoted},"format":"pt"}}'), "key 'format' beside"),
        "metadata_duplicate_entry": Attack(
            build(entry=f'{{"hones_steer":{quoted},"hones_steer":{quoted}}}'), "duplicate key 'hones_steer'"
        ),
        "metadata_not_string": Attack(build(entry=f'{{"hones_steer":{text}}}'), "is not a string"),
        "metadata_not_json": Attack(build(metadata=text[:-1]), "metadata is not valid JSON"),
        "metadata_not_object": Attack(build(metadata="[]"), "metadata is not a JSON object"),
        "metadata_duplicate_key": Attack(
            raw_metadata('"task": "vqa"', '"task": "vqa", "task": "ocr"'), "duplicate key 'task'"
        ),
        "metadata_too_deep_to_parse": Attack(build(metadata="[" * 100_000), "metadata is nested too deep"),
        "description_deep": Attack(
            raw_metadata('"a sound profile"', "[" * 200 + "]" * 200), "description is [[[[[[[...]]]]]]], not a string"
        ),
        "metadata_too_deep": Attack(with_metadata(evidence=deep), "nested deeper than 32"),
        "metadata_nan": Attack(raw_metadata('"n": 300', '"n": NaN'), "NaN is not a number"),
        "metadata_infinity": Attack(raw_metadata('"n": 300', '"n": -Infinity'), "-Infinity is not a number"),
        "metadata_float_overflow": Attack(raw_metadata('"n": 300', '"n": 1e999'), "evidence.test.n is inf"),
        "metadata_integer_huge": Attack(raw_metadata('"n": 300', '"n": ' + "9" * 30), "beyond 64 bits"),
        "metadata_integer_too_long_to_parse": Attack(
            raw_metadata('"n": 300', '"n": ' + "9" * 5000), "metadata is not valid JSON"
        ),
        "metadata_lone_surrogate": Attack(with_metadata(description="\ud800"), "description contains a lone"),
        "metadata_lone_surrogate_key": Attack(with_metadata(method={"\ud800": 1}), "a key of method contains"),
        "metadata_key_missing": Attack(build(metadata=json.dumps(without("evidence"))), "lacks the key 'evidence'"),
        "metadata_key_unknown": Attack(with_metadata(author="me"), "unknown key 'author'"),
        "format_missing": Attack(build(metadata=json.dumps(without("format"))), "format is None"),
        "format_2_of_one_width": Attack(with_metadata(format=2), "base_model lacks the key 'ffns'"),
        "format_3": Attack(with_metadata(format=3), "format is 3, but this hones-steer reads formats 1 and 2"),
        "format_string": Attack(with_metadata(format="1"), "format is '1'"),
        "format_true": Attack(with_metadata(format=True), "format is True"),
        "format_float": Attack(with_metadata(format=1.0), "format is 1.0"),
        "task_not_string": Attack(with_metadata(task=7), "task is 7, not a string"),
        "task_none": Attack(with_metadata(task="none"), "task 'none' is not a valid name"),
        "task_path": Attack(with_metadata(task="../vqa"), "task '../vqa' is not a valid name"),
        "task_newline": Attack(with_metadata(task="vqa\n"), "is not a valid name"),
        "task_too_long": Attack(with_metadata(task="a" * 65), "is not a valid name"),
        "task_not_ascii": Attack(with_metadata(task="größe"), "is not a valid name"),
        "description_not_string": Attack(with_metadata(description=["a"]), "description is ['a'], not a string"),
        "license_null": Attack(with_metadata(license=None), "license is None, not a string"),
        "created_with_not_string": Attack(with_metadata(created_with=1), "created_with is 1, not a string"),
        "method_not_object": Attack(with_metadata(method=["hones"]), "method is ['hones'], not a JSON object"),
        "evidence_not_object": Attack(with_metadata(evidence="good"), "evidence is 'good', not a JSON object"),
    }


def base_model_attacks() -> dict[str, Attack]:
    base, sketch = sound_metadata()["base_model"], sound_metadata()["base_model"]["sketch"]
    missing = {key: value for key, value in base.items() if key != "sketch"}
    return {
        "base_model_not_object": Attack(with_metadata(base_model="llava"), "base_model is 'llava'"),
        "base_model_key_missing": Attack(with_metadata(base_model=missing), "base_model lacks the key 'sketch'"),
        "base_model_key_unknown": Attack(with_base_model(heads=8), "base_model has the unknown key 'heads'"),
        "name_null": Attack(with_base_model(name=None), "base_model.name is None"),
        "revision_not_string": Attack(with_base_model(revision=1), "base_model.revision is 1"),
        "model_type_null": Attack(with_base_model(model_type=None), "base_model.model_type is None"),
        "num_layers_true": Attack(with_base_model(num_layers=True), "base_model.num_layers is True"),
        "num_layers_float": Attack(with_base_model(num_layers=4.0), "base_model.num_layers is 4.0"),
        "num_layers_zero": Attack(with_base_model(num_layers=0), "base_model.num_layers is 0"),
        "intermediate_size_string": Attack(
            with_base_model(intermediate_size="32"), "base_model.intermediate_size is '32'"
        ),
        "intermediate_size_huge": Attack(
            with_base_model(intermediate_size=2**31), "base_model.intermediate_size is 2147483648"
        ),
        "hidden_size_negative": Attack(with_base_model(hidden_size=-16), "base_model.hidden_size is -16"),
        "sketch_short": Attack(with_base_model(sketch=sketch[:15]), "not 16 numbers"),
        "sketch_object": Attack(with_base_model(sketch={}), "base_model.sketch is {}"),
        "sketch_boolean": Attack(with_base_model(sketch=[*sketch[:15], True]), "sketch contains True"),
        "sketch_string": Attack(with_base_model(sketch=[*sketch[:15], "1"]), "sketch contains '1'"),
        "sketch_integer_huge": Attack(with_base_model(sketch=[*sketch[:15], 10**400]), "sketch contains 1000"),
        "sketch_infinite": Attack(
            build(metadata=json.dumps(sound_metadata()).replace("1.9375", "1e999")), "sketch contains inf"
        ),
    }


def tensor_attacks() -> dict[str, Attack]:
    wide = struct.pack("<3q", 0, 7, 31)
    nan, inf = float("nan"), float("inf")
    return {
        "layers_none": Attack(build(tensors={}), "no layers"),
        "tensor_neurons_missing": Attack(with_tensors(layers_1_neurons=None), "layers.1.neurons is missing"),
        "tensor_scales_missing": Attack(with_tensors(layers_3_scales=None), "layers.3.scales is missing"),
        "tensor_extra": Attack(with_tensors(bias=float32(1.0)), "unexpected tensor 'bias'"),
        "tensor_extra_in_layer": Attack(with_tensors(layers_1_bias=float32(1.0)), "unexpected tensor 'layers.1.bias'"),
        "layer_leading_zero": Attack(renamed("layers.1.", "layers.01."), "unexpected tensor 'layers.01.neurons'"),
        "layer_negative": Attack(renamed("layers.1.", "layers.-1."), "unexpected tensor 'layers.-1.neurons'"),
        "layer_plus": Attack(renamed("layers.1.", "layers.+1."), "unexpected tensor 'layers.+1.neurons'"),
        "layer_not_ascii": Attack(renamed("layers.1.", "layers.١."), "unexpected tensor 'layers.١.neurons'"),
        "layer_newline": Attack(renamed(".neurons", ".neurons\n"), "unexpected tensor"),
        "layer_too_large": Attack(renamed("layers.3.", "layers.4."), "layer 4 does not exist"),
        "layer_huge": Attack(renamed("layers.3.", f"layers.{'9' * 5000}."), "unexpected tensor"),
        "neurons_int64": Attack(with_tensors(layers_1_neurons=Tensor("I64", [3], wide)), "dtype 'I64', expected I32"),
        "neurons_uint32": Attack(
            with_tensors(layers_1_neurons=int32(0, 7, 31)._replace(dtype="U32")), "dtype 'U32', expected I32"
        ),
        "scales_float64": Attack(
            with_tensors(layers_1_scales=Tensor("F64", [3], struct.pack("<3d", 0.5, 1.5, -2.0))),
            "dtype 'F64', expected F32",
        ),
        "scales_bfloat16": Attack(
            with_tensors(layers_1_scales=Tensor("BF16", [3], bytes(6))), "dtype 'BF16', expected F32"
        ),
        "scales_unknown_dtype": Attack(
            with_tensors(layers_1_scales=float32(0.5, 1.5, -2.0)._replace(dtype="O")), "dtype 'O', expected F32"
        ),
        "tensor_two_dimensions": Attack(
            with_tensors(layers_1_scales=float32(0.5, 1.5, -2.0)._replace(shape=[3, 1])), "has shape (3, 1)"
        ),
        "tensor_no_dimension": Attack(
            with_tensors(layers_1_scales=float32(0.5)._replace(shape=[])), "layers.1.scales has shape ()"
        ),
        "tensor_lengths_differ": Attack(
            with_tensors(layers_1_scales=float32(0.5, 1.5)), "layer 1 has 3 neurons and 2 scales"
        ),
        "tensor_empty": Attack(
            with_tensors(layers_1_neurons=int32(), layers_1_scales=float32()), "layer 1 lists no neurons"
        ),
        "neurons_unsorted": Attack(with_tensors(layers_1_neurons=int32(7, 0, 31)), "neuron 0 follows 7"),
        "neurons_duplicate": Attack(with_tensors(layers_1_neurons=int32(0, 7, 7)), "neuron 7 is listed twice"),
        "neurons_negative": Attack(with_tensors(layers_1_neurons=int32(-1, 7, 31)), "contains -1, outside 0 to 31"),
        "neurons_too_large": Attack(with_tensors(layers_1_neurons=int32(0, 7, 32)), "contains 32, outside 0 to 31"),
        "scales_nan": Attack(with_tensors(layers_1_scales=float32(0.5, nan, 1.0)), "scales is nan at neuron 7"),
        "scales_infinite": Attack(with_tensors(layers_3_scales=float32(-inf, 1.0)), "scales is -inf at neuron 4"),
        "scales_too_large": Attack(with_tensors(layers_3_scales=float32(1.0, -100.5)), "scales is -100.5 at neuron 5"),
    }


# Format 2 -----------------------------------------------------------------------------------------

FFNS = [{"layers": [0, 1], "dense": 32}, {"layers": [2, 4], "experts": [8, 12], "shared": 24}]


def sound_tensors_2() -> dict[str, Tensor]:
    return {
        "layers.0.neurons": int32(0, 31),
        "layers.0.scales": float32(0.5, 1.5),
        "layers.2.shared.neurons": int32(23),
        "layers.2.shared.scales": float32(2.0),
        "layers.2.experts.neurons": int32(4, 11, 0),
        "layers.2.experts.scales": float32(1.25, 0.0, -3.0),
        "layers.2.experts.index": int32(1, 1, 7),
    }


def build_2(ffns: Any = FFNS, **changes: Tensor | None) -> bytes:
    """A file of format 2, with some tensors replaced, named like `layers_2_experts_index`; None removes one."""
    base_model = {**sound_metadata()["base_model"], "ffns": ffns}
    del base_model["intermediate_size"]
    tensors: dict[str, Tensor | None] = {**sound_tensors_2()}
    tensors.update({key.replace("_", "."): value for key, value in changes.items()})
    metadata = sound_metadata() | {"format": 2, "base_model": base_model}
    return build(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, json.dumps(metadata, sort_keys=True)
    )


def with_run(**changes: Any) -> bytes:
    """The sound file with its run of experts changed."""
    return build_2([FFNS[0], {**FFNS[1], **changes}])


def ffns_attacks() -> dict[str, Attack]:
    base = sound_metadata()["base_model"]
    dense, experts = FFNS
    one_width = [{"layers": [0, 4], "dense": 32}]
    return {
        "ffns_in_format_1": Attack(with_metadata(base_model={**base, "ffns": FFNS}), "'ffns', which is for format 2"),
        "ffns_beside_width": Attack(
            with_metadata(format=2, base_model={**base, "ffns": FFNS}), "unknown key 'intermediate_size'"
        ),
        "ffns_not_list": Attack(build_2({"0": dense}), "base_model.ffns is {'0':"),
        "ffns_null": Attack(build_2(None), "base_model.ffns is None, not a list"),
        "ffns_none": Attack(build_2([]), "base_model.ffns has no FFNs"),
        "ffns_of_one_width": Attack(build_2(one_width), "only dense FFNs of one width"),
        "ffns_run_not_object": Attack(build_2([dense, 7]), "base_model.ffns[1] is 7, not an object"),
        "ffns_run_key_unknown": Attack(with_run(heads=3), "base_model.ffns[1] has the unknown key 'heads'"),
        "ffns_run_without_layers": Attack(
            build_2([dense, {"experts": [8, 12]}]), "base_model.ffns[1] lacks the key 'layers'"
        ),
        "ffns_run_without_ffn": Attack(build_2([{"layers": [0, 1]}, experts]), "neither a dense FFN nor experts"),
        "ffns_layers_float": Attack(with_run(layers=[2, 4.0]), "base_model.ffns[1].layers is [2, 4.0]"),
        "ffns_layers_true": Attack(with_run(layers=[True, 4]), "base_model.ffns[1].layers is [True, 4]"),
        "ffns_layers_empty": Attack(with_run(layers=[2, 2]), "is [2, 2], not a range of layers from 1 to 4"),
        "ffns_layers_overlap": Attack(with_run(layers=[0, 4]), "is [0, 4], not a range of layers from 1 to 4"),
        "ffns_layers_too_many": Attack(with_run(layers=[2, 5]), "is [2, 5], not a range of layers from 1 to 4"),
        "ffns_runs_alike": Attack(
            build_2([dense, {**experts, "layers": [2, 3]}, {**experts, "layers": [3, 4]}]), "[2] has the FFNs of"
        ),
        "ffns_dense_zero": Attack(with_run(dense=0), "base_model.ffns[1].dense is 0, not a positive"),
        "ffns_shared_true": Attack(with_run(shared=True), "base_model.ffns[1].shared is True"),
        "ffns_shared_alone": Attack(
            build_2([dense, {"layers": [2, 4], "dense": 32, "shared": 24}]), "a shared expert and no experts"
        ),
        "ffns_experts_number": Attack(with_run(experts=8), "base_model.ffns[1].experts is 8, not two integers"),
        "ffns_experts_none": Attack(with_run(experts=[0, 12]), "base_model.ffns[1].experts[0] is 0"),
        "ffns_experts_huge": Attack(with_run(experts=[2**20, 2**20]), "more than 2147483647 neurons in one layer"),
    }


def expert_attacks() -> dict[str, Attack]:
    renamed_shared = {"layers_0_shared_neurons": int32(1), "layers_0_shared_scales": float32(1.0)}
    return {
        "experts_index_missing": Attack(
            build_2(layers_2_experts_index=None), "tensor layers.2.experts.index is missing"
        ),
        "experts_neurons_missing": Attack(
            build_2(layers_2_experts_neurons=None), "tensor layers.2.experts.neurons is missing"
        ),
        "experts_index_int64": Attack(
            build_2(layers_2_experts_index=Tensor("I64", [3], struct.pack("<3q", 1, 1, 7))), "'I64', expected I32"
        ),
        "experts_index_short": Attack(
            build_2(layers_2_experts_index=int32(1, 7)), "layer 2's experts have 3 neurons and an index of 2"
        ),
        "experts_index_two_dimensions": Attack(
            build_2(layers_2_experts_index=int32(1, 1, 7)._replace(shape=[3, 1])), "index has shape (3, 1)"
        ),
        "experts_index_descending": Attack(
            build_2(layers_2_experts_index=int32(1, 7, 1)),
            "layers.2.experts.index is not ascending: expert 1 follows 7",
        ),
        "experts_index_negative": Attack(
            build_2(layers_2_experts_index=int32(-1, 1, 7)), "layers.2.experts.index contains -1, outside 0 to 7"
        ),
        "experts_index_too_large": Attack(
            build_2(layers_2_experts_index=int32(1, 1, 8)), "layers.2.experts.index contains 8, outside 0 to 7"
        ),
        "experts_neurons_too_large": Attack(
            build_2(layers_2_experts_neurons=int32(4, 12, 0)), "layers.2.experts.neurons contains 12, outside 0 to 11"
        ),
        "experts_neurons_unsorted": Attack(
            build_2(layers_2_experts_neurons=int32(11, 4, 0)), "neuron 4 of expert 1 follows 11"
        ),
        "experts_neurons_duplicate": Attack(
            build_2(layers_2_experts_neurons=int32(4, 4, 0)), "neuron 4 of expert 1 is listed twice"
        ),
        "experts_scales_nan": Attack(
            build_2(layers_2_experts_scales=float32(1.0, float("nan"), 1.0)), "nan at neuron 11 of expert 1"
        ),
        "experts_empty": Attack(
            build_2(
                layers_2_experts_index=int32(), layers_2_experts_neurons=int32(), layers_2_experts_scales=float32()
            ),
            "layer 2's experts list no neurons",
        ),
        "experts_in_dense_layer": Attack(
            build_2(layers_0_experts_neurons=int32(1)), "layer 0 has no experts; it has a dense FFN of 32 neurons"
        ),
        "shared_in_dense_layer": Attack(build_2(**renamed_shared), "layer 0 has no shared expert; it has a dense"),
        "shared_index": Attack(build_2(layers_2_shared_index=int32(1)), "unexpected tensor 'layers.2.shared.index'"),
        "shared_neurons_too_large": Attack(
            build_2(layers_2_shared_neurons=int32(24)), "layers.2.shared.neurons contains 24, outside 0 to 23"
        ),
        "dense_in_expert_layer": Attack(
            build_2(layers_2_neurons=int32(1), layers_2_scales=float32(1.0)),
            "layer 2 has no dense FFN; it has 8 experts of 12 neurons and a shared one of 24",
        ),
        "dense_in_layer_without_ffn": Attack(
            build_2(layers_1_neurons=int32(1), layers_1_scales=float32(1.0)), "layer 1 has no dense FFN; it has no FFN"
        ),
        "expert_by_number": Attack(
            build_2(layers_2_experts_1_neurons=int32(1)), "unexpected tensor 'layers.2.experts.1.neurons'"
        ),
        "experts_in_format_1": Attack(
            with_tensors(layers_1_experts_neurons=int32(1)), "only layers.<l>.neurons and layers.<l>.scales belong here"
        ),
    }


def attacks() -> dict[str, Attack]:
    """The attacks by file name (without suffix)."""
    return {
        **container_attacks(),
        **metadata_attacks(),
        **base_model_attacks(),
        **tensor_attacks(),
        **ffns_attacks(),
        **expert_attacks(),
    }


def main() -> None:
    """Write the folder anew."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.safetensors"):
        old.unlink()
    for name, attack in attacks().items():
        (FOLDER / f"{name}.safetensors").write_bytes(attack.data)


if __name__ == "__main__":
    main()
