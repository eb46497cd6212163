"""The LLaVA of examples/smolvlm, put together on a stand-in of its language model, served by vLLM and steered."""

import base64
import io
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
import stand_in_smollm2
import torch
from hones_offline.data.scenes import scenes
from hones_offline.running.embedded import load_tiny_vlm
from hones_offline.running.models import load_model
from hones_offline.running.prompts import render
from serving.engines import ENVIRONMENT, server
from tiny_models import random_profile

from hones_steer import save_profile, steer

QUESTION = "What is in the top left?"
NEW_TOKENS = 8


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Written by the example's script, with the embedded model's tower and a random projector."""
    script: Any = import_module("examples.smolvlm.get_model")
    folder = stand_in_smollm2.write(tmp_path / "text")
    text, tokenizer = script.load_text(folder)
    identity = script.identity_of(text, tokenizer)
    torch.manual_seed(0)
    embedded, _ = load_tiny_vlm()
    built, _ = script.build(text, tokenizer, embedded.config.vision_config)
    built.model.vision_tower.load_state_dict(embedded.model.vision_tower.state_dict())
    script.save_connector(built, identity, tmp_path / "connector.safetensors")
    script.save_model(*script.assemble(folder, tmp_path / "connector.safetensors"), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.matrix
def test_vllm_serves_it_as_transformers_runs_it(model: Path, tmp_path: Path) -> None:
    loaded, processor = load_model(str(model))
    profile = random_profile(loaded, seed=0, task="vqa", fraction=0.5)
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    save_profile(profile, profiles / "vqa.safetensors")
    pictures = [scene.image() for scene in scenes("dev", 2)]
    asked = render(processor, QUESTION, has_image=True)
    expected = {}
    with steer(loaded, {"vqa": profile}) as steering:
        for number, picture in enumerate(pictures):
            inputs = processor(images=picture, text=asked, return_tensors="pt")
            for task in ("none", "vqa"):
                with steering.task(task):
                    ids = loaded.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
                expected[number, task] = ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert len({tuple(tokens) for tokens in expected.values()}) >= 3, "image and profile change what is answered"
    command = [sys.executable, "-m", "hones_steer", "serve", str(model), "--profiles", str(profiles)]
    command += ["--served-model-name", "smolvlm", "--max-model-len", "512", "--enforce-eager", "--dtype", "float32"]
    with server(command, tmp_path / "log", ENVIRONMENT) as running:
        answered = {key: answer(running.url, pictures[key[0]], key[1]) for key in expected}
    assert answered == expected


def answer(url: str, picture: Any, task: str) -> list[int]:
    png = io.BytesIO()
    picture.save(png, "PNG")
    image = {"url": f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": QUESTION}]
    name = "smolvlm" if task == "none" else f"smolvlm:{task}"
    body = {"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": NEW_TOKENS}
    more = {"temperature": 0, "return_token_ids": True}
    done = httpx.post(f"{url}/v1/chat/completions", json={**body, **more}, timeout=120)
    assert done.status_code == 200, done.text
    tokens: list[int] = done.json()["choices"][0]["token_ids"]
    return tokens
