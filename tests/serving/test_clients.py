"""LiteLLM's proxy and lm-eval, as they are published, against a server, by the recipes in docs/routing.md."""

import json
import os
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from install_clients import find_client
from serving.engines import Server, server
from serving.sites import TEXTS
from serving.steered import write_profiles
from transformers import AutoModelForImageTextToText

ROOT = Path(__file__).parents[2]
KEY = "a key"
NEW_TOKENS = 8
QUESTIONS = [question.text for question in TEXTS]
# What the proxy and lm-eval would fetch when they start.
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}

pytestmark = pytest.mark.matrix  # the mechanism, a name as the model: test_every_route.py, with a gateway of the tests'


def recipe(begin: str, served: Server) -> str:
    """The block of the documentation that begins with `begin`, for a server of the model "tiny" at another address."""
    text = (ROOT / "docs" / "routing.md").read_text(encoding="utf-8")
    found = re.search(rf"^```\w+\n({re.escape(begin)}.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, begin
    return found[1].replace("http://localhost:8000", served.url).replace("llava", "tiny")


def program(name: str) -> str:
    found = find_client(name)
    assert found.exists(), f"{name} is not installed; `python tests/install_clients.py` installs it"
    return str(found)


@pytest.fixture(scope="module")
def served(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    here = tmp_path_factory.mktemp("clients")
    model = AutoModelForImageTextToText.from_pretrained(embedded, dtype=torch.float32)
    write_profiles(model, here / "profiles", fraction=0.9)
    command = [sys.executable, "-m", "hones_steer", "serve", str(embedded), "--engine", "transformers"]
    options = [
        "--profiles",
        str(here / "profiles"),
        "--served-model-name",
        "tiny",
        "--dtype",
        "float32",
        "--api-key",
        KEY,
    ]
    with server([*command, *options], here / "log", {}) as running:
        yield running


def answer(url: str, model: str, question: str, stream: bool = False, key: str = KEY, **body: Any) -> tuple[str, Any]:
    """The text of an answer by OpenAI's client, and the object ``hones`` in it or in a chunk of it."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300) as ai:
        said: Any = ai.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=NEW_TOKENS,
            temperature=0,
            stream=stream,
            extra_body=body,
        )
        parts = list(said) if stream else [said]
    choices = [choice for part in parts for choice in part.choices]
    text = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
    confirmed = [part.model_extra["hones"] for part in parts if "hones" in part.model_extra]
    return text, confirmed[0] if confirmed else None


def test_through_litellms_proxy(served: Server, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(recipe("model_list:", served))
    texts = {task: answer(served.url, "tiny", QUESTIONS[0], hones_task=task)[0] for task in ("vqa", "ocr", "none")}
    assert len(set(texts.values())) == 3
    command = [program("litellm"), "--config", str(config)]
    key = f"sk-{secrets.token_hex(32)}"  # the proxy starts with no weaker one
    env = {**OFFLINE, "HONES_KEY": KEY, "LITELLM_MASTER_KEY": key}
    with server(command, tmp_path / "log", env, "/health/liveliness") as proxy:
        for task, route in (("vqa", "alias"), ("ocr", "body")):
            text, confirmed = answer(proxy.url, f"tiny-{task}", QUESTIONS[0], key=key)
            assert text == texts[task]
            assert (confirmed["profile"], confirmed["route"]) == (task, route)
            # The proxy makes the chunks of a stream anew, so these confirm nothing.
            assert answer(proxy.url, f"tiny-{task}", QUESTIONS[0], stream=True, key=key)[0] == texts[task]


def test_lm_eval_measures_a_profile_by_its_name(served: Server, tmp_path: Path) -> None:
    """The right answers are those of the profile, so the exact match of its name is 1, and less without."""
    rows = [{"question": text, "answer": answer(served.url, "tiny:vqa", text)[0].strip()} for text in QUESTIONS]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "my_task.yaml").write_text(recipe("task: my_task", served))
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = recipe("lm_eval ", served).replace("\\\n", " ")
    env = {**os.environ, **OFFLINE, "OPENAI_API_KEY": KEY, "HF_HOME": str(tmp_path / "cache")}
    matches = []
    for name in ("tiny:vqa", "tiny"):
        _, *arguments = shlex.split(command.replace("model=tiny:vqa", f"model={name}"))
        out = tmp_path / name.replace(":", "-")
        done = subprocess.run(
            [program("lm_eval"), *arguments, "--output_path", str(out)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (results,) = out.rglob("results_*.json")
        matches.append(json.loads(results.read_text())["results"]["my_task"]["exact_match,none"])
    assert matches[0] == 1
    assert matches[1] < 1
