"""Several processes give one process's results, byte for byte; if one dies the others say so; runs can be resumed."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hones_offline.running.distributed import Processes
from offline.killed_run import contents
from PIL import Image
from problems import problem
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from examples.scaling import estimate
from hones_steer.cli import main

TESTS = Path(__file__).parents[1]
SCALING = TESTS.parent / "examples" / "scaling"
LOST = "lost contact with another process, which has ended or cannot be reached"


def started(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(TESTS), *sys.path])
    return subprocess.run(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the run folders, and the exit codes and messages of each scenario of several_processes.py."""
    folder = tmp_path_factory.mktemp("processes")
    done = started(sys.executable, "-W", "error", TESTS / "offline" / "several_processes.py", folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize(
    ("several", "alone"),
    [
        ("two", "alone"),
        ("damaged", "alone-damaged"),
        *((f"three-{what}", f"alone-{what}") for what in ("task", "patch", "fisher", "head_grad", "grad_act", "ap")),
    ],
)
def test_several_processes_write_the_bytes_of_one_and_all_know_the_result(
    outcome: tuple[Path, dict[str, Any]], several: str, alone: str
) -> None:
    folder, codes = outcome
    assert codes[alone] == [[0, ""]]
    assert codes[several] == [[0, ""]] * len(codes[several])
    assert contents(folder / several) == contents(folder / alone)
    expected = np.load(folder / f"{alone}-of-0.npz")
    for rank in range(len(codes[several])):
        found = np.load(folder / f"{several}-of-{rank}.npz")
        assert all(np.array_equal(found[name], expected[name]) for name in expected.files)


def test_an_image_that_one_process_cannot_read_is_left_out_and_counted_by_all(
    outcome: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = outcome
    failures = [json.loads((folder / f"damaged-of-{rank}.npz.json").read_text()) for rank in (0, 1)]
    assert failures == [{"5": "process 1: damaged"}, {"5": "damaged"}]


def test_processes_with_other_data_are_refused(outcome: tuple[Path, dict[str, Any]]) -> None:
    _, codes = outcome
    for rank, (code, message) in enumerate(codes["changed"]):
        assert code == 2
        assert f"process {rank} of 2: process {1 - rank} works on other prompts, examples than this one" in message


def test_an_error_names_its_process_and_ends_the_others(outcome: tuple[Path, dict[str, Any]]) -> None:
    _, codes = outcome
    first, second = codes["failing"]
    assert second == [2, "DataError: process 1 of 2: nothing to read"]
    assert first[0] == 2
    assert first[1].startswith(f"StateError: process 0 of 2: {LOST}")


def test_a_killed_process_ends_the_others_and_more_of_them_go_on_to_the_same_bytes(
    outcome: tuple[Path, dict[str, Any]],
) -> None:
    folder, codes = outcome
    first, second = codes["killed"]
    assert second == [-9, ""]
    assert first[0] == 2
    assert LOST in first[1]
    assert 1 < codes["files"] < len(contents(folder / "alone"))
    assert codes["resumed"] == [[0, ""]] * 3
    assert contents(folder / "killed") == contents(folder / "alone")


def test_launchers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`torchrun`, one of its processes killed, then `accelerate launch`, then what a single process writes."""
    p = problem("llava", "vqa")
    p.model.save_pretrained(tmp_path / "model")
    p.processor.save_pretrained(tmp_path / "model")
    records = []
    for i in range(4):
        Image.new("RGB", (24, 16 + 8 * i), (60 * i, 90, 200)).save(tmp_path / f"{i}.png")
        records.append(
            {"image": f"{i}.png", "prompt": "what is the " + "big " * i + "cat", "targets": ["red", "a dog"]}
        )
    (tmp_path / "cats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = ["--method", "hones", "--head-metric", "logprob", "--top-heads", 4]
    settings += ["--top-fraction", 0.05, "--batch-size", 2]
    attribute = ["attribute", tmp_path / "model", "--task", "cats", "--data", tmp_path / "cats.jsonl", *settings]

    two = ["--nproc-per-node", 2]
    killed = started(
        sys.executable,
        "-m",
        "torch.distributed.run",
        *two,
        TESTS / "offline" / "killed_process.py",
        1,
        2,
        *attribute,
        "--out",
        tmp_path / "two",
    )
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stderr
    assert not (tmp_path / "two" / "result.json").exists()

    launch = f"{sys.executable} -m accelerate.commands.launch --config_file {SCALING / '8_gpus.yaml'} --num_processes 2"
    resumed = started(
        *["bash", SCALING / "llava-1.5-7b.sh", "cats", tmp_path / "cats.jsonl", tmp_path, tmp_path / "two"],
        *["--dtype", "float32", *settings, "--json"],
        LAUNCH=launch,
        MODEL=str(tmp_path / "model"),
    )
    assert resumed.returncode == 0, resumed.stderr

    assert main([*map(str, attribute), "--out", str(tmp_path / "one"), "--json"]) == 0
    assert json.loads(resumed.stdout) == json.loads(capsys.readouterr().out)  # printed once
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_what_runs_in_one_process_says_so(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    more = ["--bank", "runs", "--out", str(tmp_path / "profile.safetensors")] if command == "fit" else []
    assert main([command, "model", "--task", "vqa", "--data", "data.jsonl", *more]) == 2
    assert f"`hones {command}` runs in one process; start it without torchrun" in capsys.readouterr().err


def test_processes_that_cannot_find_one_another_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["attribute", "model", "--task", "vqa", "--data", "data.jsonl", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "2 processes cannot find one another" in error
    assert "start them with torchrun" in error


@pytest.mark.parametrize(("batches", "size"), [(1, 1), (63, 8), (63, 64), (7, 64), (1, 64)])
def test_every_unit_belongs_to_one_process_and_none_has_much_more_than_its_share(batches: int, size: int) -> None:
    layers = 32
    parts = Processes(0, size).parts(batches, layers)
    costs = np.zeros(size)
    for number in range(batches):
        for layer in range(layers):
            owners = [rank for rank in range(size) if Processes(rank, size).owns(number * parts + layer % parts)]
            assert len(owners) == 1
            costs[owners] += layers - layer
    if batches * layers >= 4 * size:
        assert costs.max() < 1.35 * costs.mean()


def test_the_documented_costs_are_what_the_script_computes(capsys: pytest.CaptureFixture[str]) -> None:
    estimate.main(["--examples", "1000", "--gpus", "1", "8", "64"])
    assert capsys.readouterr().out in (TESTS.parent / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_costs_count_the_models_real_weights() -> None:
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(LlavaConfig())  # transformers' defaults are LLaVA-1.5-7B
        qwen = Qwen2DecoderLayer(
            Qwen2Config(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4), 0
        )
    shape = estimate.llava()
    assert shape.weights == pytest.approx(sum(p.numel() for p in llava.parameters()), rel=0.01)
    for found, layer in ((shape, llava.model.language_model.layers[0]), (estimate.qwen(300), qwen)):
        expected = sum(p.numel() for p in layer.parameters())
        assert found.layer_parameters == pytest.approx(expected, rel=1e-3)  # norms and biases are left out


def test_little_of_the_estimated_time_is_lost_on_many_gpus() -> None:
    args = argparse.Namespace(
        examples=1000,
        batch_size=16,
        text_tokens=44,
        answer_tokens=10,
        tflops=312,
        utilisation=0.4,
        bandwidth=2,
        parted=0.2,
        evaluated=1.0,
    )
    run = estimate.Run(estimate.llava(), args)
    flops = sum(
        n * run.shape.layer_flops(t) for n, t in zip(run.layer_forwards(), (run.tokens, run.prompt), strict=True)
    )
    alone = run.hours(1, "logprob")
    assert alone == pytest.approx(flops / (312e12 * 0.4) / 3600, rel=0.01)  # the vision tower is what comes on top
    assert alone / 64 < run.hours(64, "logprob") < 1.1 * alone / 64
