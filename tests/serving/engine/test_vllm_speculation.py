"""Speculative decoding: a plain drafter, verified by the steered model, so tokens are those without speculation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hones_serving.metrics import Metrics
from prometheus_client import CollectorRegistry
from serving.engines import V2
from serving.steered import (
    MIXED,
    Reference,
    answers,
    answers_alone,
    changed,
    engine,
    prompts,
    request,
    sampling,
    tokens_of,
    write_profiles,
)
from transformers import AutoModelForCausalLM

from serving import drafters

PROMPTS = prompts(len(MIXED))
UNSTEERED = [None] * len(MIXED)
DRAFTED = 3  # tokens at a time
SCOPED = (("vqa", "prompt"), ("vqa", "generated"), ("ocr", "generated"), ("cap@0.5", "prompt"))


@pytest.fixture(scope="module")
def reference(llama: Path, profiles: Path) -> Reference:
    return Reference(AutoModelForCausalLM.from_pretrained(llama), profiles)


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[list[int]]:
    return expected_of(reference)


@pytest.fixture(scope="module")
def in_scope(reference: Reference) -> list[list[int]]:
    return in_scope_of(reference)


def in_scope_of(reference: Reference) -> list[list[int]]:
    """The tokens of the first requests, each with an expression and a scope of SCOPED."""
    return [reference.tokens(PROMPTS[i], expression, scope=scope) for i, (expression, scope) in enumerate(SCOPED)]


def expected_of(reference: Reference) -> list[list[int]]:
    expected = reference.answers(PROMPTS, MIXED)
    assert changed(expected, reference.answers(PROMPTS, UNSTEERED), MIXED) >= 0.8
    return expected


def neighbors(rows: Sequence[list[int]]) -> tuple[list[int], list[int]]:
    """All tokens of several answers that have one after them, and those."""
    return [token for row in rows for token in row[:-1]], [token for row in rows for token in row[1:]]


def seen_by_eagle3(reference: Reference, expected: Sequence[list[int]]) -> tuple[torch.Tensor, list[int]]:
    """Hidden states `[n, 3 * hidden size]` of steered requests, and for each the token after the next."""
    states, following = [], []
    for prompt, expression, answer in zip(PROMPTS, MIXED, expected, strict=True):
        ids = prompt + answer
        with torch.no_grad(), reference.steering.task(expression or "none"):
            hidden = reference.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        seen = torch.cat([hidden[layer][0] for layer in drafters.AUX_LAYERS], dim=1)
        states.append(seen[len(prompt) - 1 : -2])
        following += ids[len(prompt) + 1 :]
    return torch.cat(states), following


@pytest.fixture(scope="module")
def drafting(
    llama: Path,
    reference: Reference,
    expected: list[list[int]],
    in_scope: list[list[int]],  # noqa: ARG001 -- before the steering is taken off
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """The `speculative_config` of each method; the draft model is the target itself, unsteered."""
    folder = tmp_path_factory.mktemp("drafters")
    heads = {
        "eagle": drafters.eagle(folder / "one", reference.model, *neighbors(expected)),
        "eagle3": drafters.eagle3(folder / "three", reference.model, *seen_by_eagle3(reference, expected)),
        "draft_model": llama,
    }
    settings = {
        method: {"method": method, "model": str(model), "num_speculative_tokens": DRAFTED}
        for method, model in heads.items()
    }
    reference.steering.detach()  # engines that compile come after it
    return settings


@contextmanager
def drafts_counted(llm: Any) -> Iterator[dict[str, tuple[int, int]]]:
    """Gives the (drafted, accepted) tokens of the requests that end in the block, by profile, once it has ended.

    Requests are added before: an engine that belongs to a server takes no expressions.
    """
    front, counts = llm.llm_engine.input_processor.hones_front, {}
    collector = CollectorRegistry()
    front.metrics = Metrics(front.registry, collector)
    before = vllm_counts(llm)
    try:
        yield counts
    finally:
        front.metrics = None
    for name in (*front.registry.tasks(), "blend", "none"):
        totals = [
            int(collector.get_sample_value(f"hones_{kind}_total", {"profile": name}) or 0)
            for kind in ("draft_tokens", "accepted_draft_tokens")
        ]
        if any(totals):
            counts[name] = (totals[0], totals[1])
    ours = [sum(column) for column in zip(*counts.values(), strict=True)]
    assert ours == [after - earlier for after, earlier in zip(vllm_counts(llm), before, strict=True)]


def vllm_counts(llm: Any) -> list[int]:
    """Drafted and accepted tokens so far, by vLLM's own metrics."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return [int(values[f"vllm:spec_decode_num_{kind}_tokens"]) for kind in ("draft", "accepted")]


def check(llm: Any, expected: list[list[int]], in_scope: list[list[int]]) -> dict[str, tuple[int, int]]:
    """Check a mixed batch, its requests alone, and that the drafter is plain; returns what `drafts_counted` gives.

    Then checks a batch in which a part of each request's tokens is steered.
    """
    assert llm.collective_rpc(hooked) == [(expected_layers(llm), 0)]
    for i, (prompt, expression) in enumerate(zip(PROMPTS, MIXED, strict=True)):
        llm.llm_engine.add_request(str(i), request(prompt), sampling(expression))
    tokens: dict[int, list[int]] = {}
    with drafts_counted(llm) as counts:
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
                assert output.outputs[0].spec_decode_metrics is None  # nobody asked for them
    assert [tokens[i] for i in range(len(MIXED))] == expected
    assert answers_alone(llm, PROMPTS, MIXED) == expected
    params = [sampling(expression, scope) for expression, scope in SCOPED]
    outputs = llm.generate([request(prompt) for prompt in PROMPTS[: len(SCOPED)]], params, use_tqdm=False)
    assert tokens_of(outputs) == in_scope
    return counts


def expected_layers(llm: Any) -> int:
    layers: int = llm.llm_engine.vllm_config.model_config.hf_text_config.num_hidden_layers
    return layers


def hooked(worker: Any) -> tuple[int, int]:
    """Numbers of steered down-projections of the target and of the drafter."""
    runner = worker.model_runner
    drafter = runner.get_draft_model() if V2 else runner.drafter.model
    models = runner.get_model(), drafter
    target, draft = (sum(hasattr(part, "hones_scaling") for part in model.modules()) for model in models)
    return target, draft


@pytest.mark.both_runners
@pytest.mark.parametrize("method", ["draft_model", pytest.param("eagle", marks=pytest.mark.matrix), "eagle3"])
def test_tokens_are_those_without_speculation(
    method: str,
    llama: Path,
    profiles: Path,
    expected: list[list[int]],
    in_scope: list[list[int]],
    drafting: dict[str, dict[str, Any]],
) -> None:
    options = {"speculative_config": drafting[method], "disable_log_stats": False}
    with engine(llama, profiles, **options) as llm:
        counts = check(llm, expected, in_scope)
    accepted = {name: accepted / drafted for name, (drafted, accepted) in counts.items()}
    assert accepted.keys() == {"none", "vqa", "ocr", "cap", "blend"}
    if method == "draft_model":  # an unsteered target takes all that it would have said itself
        assert accepted.pop("none") == 1
        assert all(rate < 1 for rate in accepted.values())
    else:
        assert sum(accepted.values()) > 0.5


@pytest.mark.matrix
def test_compiled_and_in_chunks(
    llama: Path, profiles: Path, expected: list[list[int]], drafting: dict[str, dict[str, Any]]
) -> None:
    options = {"speculative_config": drafting["eagle"], "enforce_eager": False, "max_num_batched_tokens": 40}
    with engine(llama, profiles, **options) as llm:
        assert answers(llm, PROMPTS, MIXED) == expected


@pytest.mark.matrix
@pytest.mark.both_runners
def test_a_layer_of_the_checkpoint_for_multi_token_prediction(tmp_path: Path) -> None:
    model = drafters.qwen2()
    write_profiles(model, tmp_path / "profiles")
    reference = Reference(model, tmp_path / "profiles")
    expected, in_scope = expected_of(reference), in_scope_of(reference)
    reference.steering.detach()
    folder = drafters.mimo(tmp_path / "mimo", model, *neighbors(expected))
    speculative = {"method": "mtp", "num_speculative_tokens": 1}
    options = {"speculative_config": speculative, "disable_log_stats": False}
    with engine(folder, tmp_path / "profiles", **options) as llm:
        assert sum(accepted for _, accepted in check(llm, expected, in_scope).values()) > 0
