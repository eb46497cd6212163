"""``vllm run-batch`` steers each line of a batch file as the server would steer the request."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.engines import ENVIRONMENT
from serving.http_helpers import NEW_TOKENS
from serving.sites import TEXTS, confirmation
from serving.steered import Reference, write_profiles
from transformers import AutoModelForImageTextToText, AutoProcessor

TEXT = TEXTS[0].text
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": TEXT}]}]


@pytest.mark.matrix  # what it shares with the server: test_every_route.py, test_http.py
def test_each_line_is_steered_by_what_it_names(embedded: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(embedded, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(embedded)
    folder, routing = tmp_path / "profiles", tmp_path / "routing.yaml"
    profiles = write_profiles(model, folder, fraction=0.9)
    reference = Reference(model, folder, processor)
    routing.write_text("default: none\nrules: [{task: ocr, prompt_regex: cat|dog|the|a}]\n")
    lines: list[tuple[dict[str, Any], str, str, str]] = [
        ({"model": "tiny:vqa"}, "vqa", "all", "alias"),
        ({"hones_task": "vqa@0.5+ocr"}, "vqa@0.5+ocr", "all", "body"),
        ({"hones_task": "cap@2", "hones_scope": "generated"}, "cap@2", "generated", "body"),
        ({"vllm_xargs": {"hones_task": "none"}}, "none", "all", "body"),
        ({}, "ocr", "all", "rule"),
        ({"model": "tiny:nope"}, "", "all", "alias"),
    ]
    done = run_batch([body for body, *_ in lines], embedded, folder, routing, tmp_path)
    assert done[-1]["response"]["status_code"] == 404
    assert "known tasks: cap, ocr, vqa" in done[-1]["error"]["error"]["message"]
    prompt = processor.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    ids = processor.tokenizer(prompt)["input_ids"]
    texts = set()
    for line, (body, expression, scope, route) in zip(done[:-1], lines, strict=False):
        answer = line["response"]["body"]
        assert answer["hones"] == confirmation(profiles, expression, route, scope)
        assert answer["model"] == body.get("model", "tiny")
        tokens = reference.tokens(ids, expression, NEW_TOKENS, scope)
        expected = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        texts.add(answer["choices"][0]["message"]["content"].strip())
        assert answer["choices"][0]["message"]["content"].strip() == expected.strip()
    assert len(texts) == 5


def run_batch(bodies: list[dict[str, Any]], model: Path, folder: Path, routing: Path, here: Path) -> list[Any]:
    """The output of vLLM's batch runner for these bodies of chat completions, in their order."""
    common = {"model": "tiny", "messages": MESSAGES, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": {**common, **body}}
        for i, body in enumerate(bodies)
    ]
    given, got = here / "in.jsonl", here / "out.jsonl"
    given.write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch", "-i", str(given), "-o", str(got)]
    options = ["--model", str(model), "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "512"]
    env = {**ENVIRONMENT, "HONES_PROFILES": str(folder), "HONES_ROUTING": str(routing)}
    done = subprocess.run(
        [*command, *options, "--max-num-seqs", "8", "--enforce-eager"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted((json.loads(line) for line in got.read_text().splitlines()), key=lambda line: int(line["custom_id"]))
