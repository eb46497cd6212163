"""`hones export` and `hones import` as a user types them."""

import json

import pytest
import tiny_models
from peft import PeftConfig
from steer.conversions import few_layers
from transformers import AutoModelForCausalLM

from hones_steer import load_profile, save_profile
from hones_steer.cli import export_command, hub_commands, program
from hones_steer.cli.export_command import export, import_
from hones_steer.errors import HonesError


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with base/ and vqa.safetensors, which commands are run in."""
    model = tiny_models.llama()
    model.save_pretrained(tmp_path / "base")
    save_profile(few_layers(model), tmp_path / "vqa.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_adapter_and_back(files, capsys):
    assert export(["vqa.safetensors", "base", "--to", "peft", "--out", "ia3"]) == 0
    assert PeftConfig.from_pretrained("ia3").peft_type == "IA3"
    assert import_(["ia3", "--out", "back.safetensors"]) == 0
    assert (files / "back.safetensors").read_bytes() == (files / "vqa.safetensors").read_bytes()
    assert import_(["ia3", "--out", "named.safetensors", "--task", "mine", "--model", "base", "--json"]) == 0
    assert load_profile("named.safetensors").task == "mine"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ia3: ")
    assert lines[0].endswith("of 'vqa', as an IA3 adapter")
    assert json.loads("\n".join(lines[2:]))["profiles"]["mine"]["file"] == "named.safetensors"


def test_a_lora_says_its_rank_and_error(files, capsys):
    arguments = ["vqa.safetensors", "base", "--to", "lora"]
    assert export([*arguments, "--out", "lora", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rank"] == 32
    assert 0 < said["error"] < 1e-7
    assert export([*arguments, "--out", "small", "--max-rank", "30", "--truncate", "svd"]) == 0
    assert "as a LoRA of rank 30, truncated, off by up to" in capsys.readouterr().out
    with pytest.raises(HonesError, match="--max-rank"):
        export([*arguments, "--out", "refused", "--max-rank", "30"])
    assert not (files / "refused").exists()


def test_a_merged_checkpoint(files, capsys):
    assert export(["vqa.safetensors", "base", "--to", "merged", "--out", "new/merged"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("of 'vqa', merged into the weights\n")
    assert captured.err == ""  # no bar where there is no terminal
    AutoModelForCausalLM.from_pretrained(files / "new" / "merged")


def test_a_quantized_checkpoint_takes_an_adapter_but_no_merge(files):
    config = json.loads((files / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (files / "base" / "config.json").write_text(json.dumps(config))
    assert export(["vqa.safetensors", "base", "--to", "peft", "--out", "ia3"]) == 0
    with pytest.raises(HonesError, match=r"is quantized \(gptq\)"):
        export(["vqa.safetensors", "base", "--to", "merged", "--out", "merged"])
    assert not (files / "merged").exists()


@pytest.mark.parametrize("name", ["export", "import", "push", "pull"])
def test_the_help_teaches_by_example(name, capsys):
    module = hub_commands if name.startswith("pu") else export_command
    with pytest.raises(SystemExit, match="0"):
        getattr(module, "import_" if name == "import" else name)(["--help"])
    assert f"  hones {name} " in capsys.readouterr().out.partition("example:")[2]
    assert name in program._SUMMARIES
