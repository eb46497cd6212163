"""Merged checkpoints: complete, equal to `fold` bit for bit, read in little memory, and whole or not there."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
import torch
from reference_steering import down_projections
from safetensors.torch import load_file, save_file
from steer.conversions import INPUTS, MODELS, few_layers, logits
from tiny_models import random_profile
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hones_steer import MismatchError, Profile, merge_into, save_profile, steer
from hones_steer.errors import DataError

INDEX = "model.safetensors.index.json"


def load(folder):
    config = json.loads((folder / "config.json").read_text())
    kind = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    return kind.from_pretrained(folder).eval()


def tensors_of(folder):
    """The tensors on the disk by their keys."""
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.fixture
def sharded(tmp_path):
    """A Llama in several files."""
    model = tiny_models.llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    return tmp_path / "base"


@pytest.mark.parametrize(("dtype", "shard_size"), [(torch.float32, "40KB"), (torch.bfloat16, "1GB")])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_folded_model_bit_for_bit(name, shard_size, dtype, tmp_path):
    MODELS[name]().to(dtype).save_pretrained(tmp_path / "base", max_shard_size=shard_size)
    model, inputs = load(tmp_path / "base"), INPUTS[name]()
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    profile = few_layers(model)
    plain = logits(model, inputs)
    steer(model, {"vqa": profile}).fold("vqa")
    assert merge_into(profile, tmp_path / "base", tmp_path / "merged") == profile.num_neurons
    merged = load(tmp_path / "merged")
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in merged.state_dict().items())
    assert torch.equal(logits(merged, inputs), logits(model, inputs))
    assert not torch.allclose(logits(merged, inputs), plain, atol=0.1)


def test_only_the_listed_columns_change_on_the_disk(sharded, tmp_path):
    profile = few_layers(load(sharded))
    merge_into(profile, sharded, tmp_path / "merged")
    before, after = tensors_of(sharded), tensors_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        changed = (after[key] != tensor).reshape(-1, tensor.shape[-1]).any(0).nonzero().flatten().tolist()
        layer = int(key.split(".")[2]) if key.endswith("down_proj.weight") else None
        neurons, scales = profile.layers.get(layer, ([], []))
        assert changed == [int(n) for n, s in zip(neurons, scales, strict=True) if s != 1], key
    assert (tmp_path / "merged" / INDEX).read_bytes() == (sharded / INDEX).read_bytes()


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key,
        lambda key: key.replace("model.language_model.", "language_model.model.").replace("model.vision", "vision"),
    ],
    ids=["as transformers 5 names its modules", "as the released LLaVA names them"],
)
def test_names_on_the_disk_may_differ_from_the_modules(rename, tmp_path):
    model = tiny_models.llava()
    model.save_pretrained(tmp_path / "base")
    renamed = {rename(key): tensor for key, tensor in model.state_dict().items()}
    save_file(renamed, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    profile, inputs = few_layers(model), INPUTS["llava"]()
    merge_into(profile, tmp_path / "base", tmp_path / "merged")
    assert tensors_of(tmp_path / "merged").keys() == renamed.keys()
    steer(model, {"vqa": profile}).fold("vqa")
    assert torch.equal(logits(load(tmp_path / "merged"), inputs), logits(model, inputs))


def test_everything_but_other_forms_of_the_weights_comes_along(sharded, tmp_path):
    extras = {"README.md": b"# Base", "LICENSE": b"free", "chat_template.jinja": b"{{ x }}", "tokenizer.json": b"{}"}
    left = {"pytorch_model.bin": b"1", "consolidated.safetensors": b"2", ".hidden": b"3", "weights.gguf": b"4"}
    for name, data in {**extras, **left}.items():
        (sharded / name).write_bytes(data)
    merge_into(few_layers(load(sharded)), sharded, tmp_path / "merged")
    merged = {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()}
    assert merged["README.base.md"] == b"# Base"
    assert {name: merged[name] for name in extras if name != "README.md"} == {
        name: data for name, data in extras.items() if name != "README.md"
    }
    assert not merged.keys() & left.keys()


def test_the_card_says_where_it_comes_from(sharded, tmp_path):
    profile = few_layers(load(sharded))
    merge_into(profile, sharded, tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert profile.digest in text
    assert f"{profile.num_neurons:,} columns" in text
    assert "| vqa | accuracy | 300 | 0.71 | 0.75 | [0.01, 0.07] |" in text
    assert "license:" not in text  # the profile's, which is not the weights'


def test_merging_twice_is_refused(sharded, tmp_path):
    profile = few_layers(load(sharded))
    merge_into(profile, sharded, tmp_path / "merged")
    with pytest.raises(DataError, match="is merged with a profile already; merge a sum"):
        merge_into(profile, tmp_path / "merged", tmp_path / "twice")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def to_float8(folder):
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        stored = {k: v.to(torch.float8_e4m3fn) if "down_proj" in k else v for k, v in tensors.items()}
        save_file(stored, file, metadata={"format": "pt"})


def truncate(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def drop_layer_0(folder):
    for file in folder.glob("*.safetensors"):
        kept = {key: tensor for key, tensor in load_file(file).items() if "layers.0.mlp.down_proj" not in key}
        save_file(kept, file, metadata={"format": "pt"})


BAD = {
    "quantized": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}),
        r"quantized \(gptq\)",
    ),
    "float8 tensors": (to_float8, "is stored as F8_E4M3: a quantized checkpoint"),
    "no safetensors": (lambda folder: (folder / INDEX).unlink(), "has no model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "truncated": (truncate, "cannot be read"),
    "a shard missing": (lambda folder: next(folder.glob("*.safetensors")).unlink(), "get the whole checkpoint"),
    "a path in the index": (
        lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}})),
        r"'../a.safetensors', which .* names, is not there",
    ),
    "a weight missing": (drop_layer_0, r"has no model\.layers\.0\.mlp\.down_proj\.weight"),
    "another shape": (lambda folder: edit_config(folder, intermediate_size=64), "intermediate_size is 96"),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_merged_is_refused_before_anything_is_written(sharded, tmp_path, damage, message):
    profile = few_layers(load(sharded))
    damage(sharded)
    with pytest.raises((DataError, MismatchError), match=message):
        merge_into(profile, sharded, tmp_path / "new" / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_profile_of_another_model_is_refused(sharded, tmp_path):
    profile = few_layers(tiny_models.llama(seed=1))
    with pytest.raises(MismatchError, match="final norm"):
        merge_into(profile, sharded, tmp_path / "merged")
    merge_into(profile, sharded, tmp_path / "merged", allow_mismatch=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_scale_beyond_float16_is_refused_before_anything_is_written(name, tmp_path):
    model = MODELS[name]().half()
    projection = down_projections(model)[1]
    with torch.no_grad():
        projection.weight[(7, 3) if name == "gpt2" else (3, 7)] = 1000
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    layers = {0: ([1], [2]), 1: ([5, 7], [0.5, 100])}
    layers = {layer: (np.array(n, np.int32), np.array(s, np.float32)) for layer, (n, s) in layers.items()}
    profile = Profile("vqa", layers, few_layers(model).base_model)
    message = (
        r"\.1\..*: neuron 7 with scale 100 goes beyond float16 \(65504 at most\); lower .* bfloat16 or float32 and"
    )
    copied = []
    with pytest.raises(DataError, match=message):
        merge_into(profile, tmp_path / "base", tmp_path / "new" / "merged", progress=lambda names: copied.append(names))
    assert not copied
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# A disk that is full in the middle, and a process that is killed there ----------------------------

MERGE = """
import resource, signal, sys
from hones_steer import load_profile, merge_into
profile, base, out, limit, kill = sys.argv[1:]
import hones_steer.export.merged
if kill == "kill":
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
merge_into(load_profile(profile), base, out)
"""


def merge_with_files_up_to(limit, profile, base, out, how):
    save_profile(profile, out.parent / "profile.safetensors")
    arguments = [str(out.parent / "profile.safetensors"), str(base), str(out), str(limit), how]
    # -B: the limit is for the files of the merge, not for what Python caches.
    return subprocess.run([sys.executable, "-B", "-c", MERGE, *arguments], capture_output=True, text=True)


@pytest.fixture
def growing(tmp_path):
    """A checkpoint whose last file is the largest, and a limit that all the others stay below."""
    model = tiny_models.llama()
    base = tmp_path / "base"
    model.save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    large = {key: tensor for key, tensor in tensors.items() if "layers.2" in key}
    small = {key: tensor for key, tensor in tensors.items() if key not in large}
    large["extra"] = torch.zeros(100_000)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file(small, base / first, metadata={"format": "pt"})
    save_file(large, base / second, metadata={"format": "pt"})
    weight_map = {**dict.fromkeys(small, first), **dict.fromkeys(large, second)}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert (base / first).stat().st_size < 300_000 < (base / second).stat().st_size
    return few_layers(model), base, 300_000


def test_a_disk_that_is_full_in_the_middle_leaves_nothing(growing, tmp_path):
    profile, base, limit = growing
    (tmp_path / "out").mkdir()
    done = merge_with_files_up_to(limit, profile, base, tmp_path / "out" / "merged", "fail")
    assert "DataError" in done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["profile.safetensors"]


def test_a_killed_merge_leaves_nothing_that_loads(growing, tmp_path):
    profile, base, limit = growing
    (tmp_path / "out").mkdir()
    done = merge_with_files_up_to(limit, profile, base, tmp_path / "out" / "merged", "kill")
    assert done.returncode == -signal.SIGXFSZ
    assert not (tmp_path / "out" / "merged").exists()
    (left,) = (tmp_path / "out").glob(".hones-*")
    assert not (left / INDEX).exists()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load(left)


# Memory -------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
import hones_steer.export.merged
from hones_steer import load_profile

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

profile = load_profile(sys.argv[1])
hones_steer.export.merged.open_checkpoint(sys.argv[2])  # what is imported on the way is no weight
before = peak()
hones_steer.export.merged.merge_into(profile, sys.argv[2], sys.argv[3])
print(peak() - before)
"""


def test_the_peak_memory_is_below_one_shard(tmp_path):
    model = tiny_models.llama(hidden_size=512, intermediate_size=4096, num_hidden_layers=6).to(torch.bfloat16)
    save_profile(random_profile(model, 1, fraction=0.01), tmp_path / "profile.safetensors")
    model.save_pretrained(tmp_path / "base", max_shard_size="13MB")
    sizes = [file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")]
    assert len(sizes) >= 6
    paths = [str(tmp_path / name) for name in ("profile.safetensors", "base", "merged")]
    done = subprocess.run([sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, check=True)
    growth = int(done.stdout)
    print(f"{sum(sizes):,} bytes in {len(sizes)} files, the largest {max(sizes):,}: {growth:,} more in memory")
    assert growth < max(sizes)
