"""Steering under settings of production: each gives the results of transformers, or is refused."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving.steered import (
    MIXED,
    NEW_TOKENS,
    Reference,
    answers,
    changed,
    check_lora,
    engine,
    generate,
    prompts,
    tokens_of,
    words,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = prompts(len(MIXED))
UNSTEERED = [None] * len(MIXED)


@pytest.fixture(scope="module")
def reference(llama: Path, profiles: Path) -> Reference:
    return Reference(AutoModelForCausalLM.from_pretrained(llama), profiles)


# Quantized and half precision: tokens cannot be compared with transformers', log-probabilities can ---


def prompt_logprobs(outputs: list[Any]) -> list[torch.Tensor]:
    """Log-probabilities `[tokens - 1]` of each prompt's tokens, from the second on."""
    return [chosen(output.prompt_token_ids[1:], output.prompt_logprobs[1:]) for output in outputs]


def chosen(tokens: Sequence[int], logprobs: Any) -> torch.Tensor:
    return torch.tensor([step[token].logprob for token, step in zip(tokens, logprobs, strict=True)])


def reference_logprobs(reference: Reference, prompt: list[int], expression: str | None) -> torch.Tensor:
    return reference.logprobs(prompt, expression)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference between the log-probabilities of two runs."""
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def check_rounded_model(folder: Path, profiles: Path, reference: Reference, **options: Any) -> None:
    """Check that unsteered requests are as without hones, and steered ones no farther from transformers than those.

    The noise is the larger of two distances: of the unsteered requests from transformers, and of the same requests
    alone from those in a batch. Steering enlarges errors as it enlarges activations, which the factor of 3 allows for.
    It must also move answers by 10 times the noise: with less than 4 an engine that does not steer could pass.
    """
    batch = [words(40, seed=i) for i in range(len(MIXED))]
    measured = {"max_tokens": 1, "prompt_logprobs": 0}
    with engine(folder, None, **options) as llm:
        without = generate(llm, batch, UNSTEERED, **measured)
        tokens_without = answers(llm, PROMPTS, UNSTEERED)
    with engine(folder, profiles, **options) as llm:
        idle = generate(llm, batch, UNSTEERED, **measured)
        mixed = prompt_logprobs(generate(llm, batch, MIXED, **measured))
        alone = [prompt_logprobs(generate(llm, [p], [e], **measured))[0] for p, e in zip(batch, MIXED, strict=True)]
        tokens_idle = answers(llm, PROMPTS, UNSTEERED)
        tokens_mixed = answers(llm, PROMPTS, MIXED)
    assert tokens_idle == tokens_without
    assert distance(prompt_logprobs(idle), prompt_logprobs(without)) == 0
    for row in (row for row, expression in enumerate(MIXED) if expression in (None, "none")):
        assert tokens_mixed[row] == tokens_without[row]
    unsteered = [reference_logprobs(reference, p, None) for p in batch]
    steered = [reference_logprobs(reference, p, e) for p, e in zip(batch, MIXED, strict=True)]
    noise = max(distance(mixed, alone), distance(prompt_logprobs(without), unsteered))
    assert distance(mixed, steered) <= 3 * noise
    assert distance(unsteered, steered) > 10 * noise


@pytest.mark.both_runners
def test_bfloat16(llama: Path, profiles: Path) -> None:
    reference = Reference(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16), profiles)
    check_rounded_model(llama, profiles, reference, dtype="bfloat16")


@pytest.mark.both_runners
def test_int8_weights_and_activations(llama: Path, profiles: Path, tmp_path: Path) -> None:
    """Runs in bfloat16, because vLLM's int8 kernels for CPUs with AMX take no float32."""
    write_int8(llama, tmp_path / "int8")
    reference = Reference(AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.bfloat16), profiles)
    check_rounded_model(tmp_path / "int8", profiles, reference, dtype="bfloat16")


def write_int8(llama: Path, folder: Path) -> None:
    """Write a checkpoint in compressed-tensors' format: int8 weights, a scale per output; activations int8 per token.

    Weights go to 63, not 127: without VNNI, two products of bytes are added in 16 bits, which larger ones overflow.
    """
    shutil.copytree(llama, folder)
    tensors = {}
    for name, weight in load_file(llama / "model.safetensors").items():
        if "_proj.weight" not in name:
            tensors[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 63
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


# Other settings of the engine ---------------------------------------------------------------------


@pytest.mark.both_runners
def test_lora_beside_it(llama: Path, profiles: Path, tmp_path: Path) -> None:
    check_lora(llama, profiles, tmp_path / "lora")


# Sampling, in one engine --------------------------------------------------------------------------


@pytest.fixture(scope="class")
def llm(
    llama: Path,
    profiles: Path,
    reference: Reference,  # noqa: ARG001 -- attached before the engine starts
) -> Iterator[Any]:
    with engine(llama, profiles) as llm:
        yield llm


def continuation_logprobs(reference: Reference, prompt: list[int], tokens: list[int], expression: str | None) -> Any:
    return reference_logprobs(reference, prompt + tokens, expression)[len(prompt) - 1 :]


def greedy_without(banned: int, reference: Reference, prompt: list[int], expression: str, count: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(count):
        logprobs = reference.logprobs(prompt + tokens, expression)[-1]
        logprobs[banned] = -torch.inf
        tokens.append(int(logprobs.argmax()))
    return tokens


class TestSampling:
    @pytest.mark.both_runners(everyday=True)
    def test_logprobs_of_prompts_and_tokens(self, llm: Any, reference: Reference) -> None:
        outputs = generate(llm, PROMPTS, MIXED, logprobs=0, prompt_logprobs=0)
        for output, prompt, expression, of_prompt in zip(
            outputs, PROMPTS, MIXED, prompt_logprobs(outputs), strict=True
        ):
            tokens = list(output.outputs[0].token_ids)
            expected = continuation_logprobs(reference, prompt, tokens, expression)
            torch.testing.assert_close(chosen(tokens, output.outputs[0].logprobs), expected, atol=1e-3, rtol=1e-3)
            expected = reference_logprobs(reference, prompt, expression)
            torch.testing.assert_close(of_prompt, expected, atol=1e-3, rtol=1e-3)

    @pytest.mark.both_runners
    def test_several_sampled_sequences(self, llm: Any, reference: Reference) -> None:
        """The seed fixes the sampled tokens; their log-probabilities show that the steered model gave them."""
        sampled = {"n": 2, "temperature": 1.0, "seed": 7, "logprobs": 0}
        outputs = generate(llm, PROMPTS, MIXED, **sampled)
        for output, prompt, expression in zip(outputs, PROMPTS, MIXED, strict=True):
            first, second = (list(sequence.token_ids) for sequence in output.outputs)
            assert first != second
            for sequence, tokens in zip(output.outputs, (first, second), strict=True):
                expected = continuation_logprobs(reference, prompt, tokens, expression)
                torch.testing.assert_close(chosen(tokens, sequence.logprobs), expected, atol=1e-3, rtol=1e-3)
            (alone,) = generate(llm, [prompt], [expression], **sampled)
            assert [list(sequence.token_ids) for sequence in alone.outputs] == [first, second]

    @pytest.mark.filterwarnings("ignore:max_rollback_tokens is deprecated:DeprecationWarning")  # vLLM sets it
    @pytest.mark.parametrize("kind", [pytest.param("choice", marks=pytest.mark.both_runners(everyday=True)), "regex"])
    def test_structured_output(self, llm: Any, reference: Reference, llama: Path, kind: str) -> None:
        """The answer is the allowed word to which the steered model gives the highest probability."""
        from vllm.sampling_params import StructuredOutputsParams

        allowed = ["red", "blue", "green", "circle", "square", "left", "right", "top", "cat", "dog", "city", "town"]
        ids = torch.tensor(AutoTokenizer.from_pretrained(llama).convert_tokens_to_ids(allowed))
        constraint = {"choice": allowed, "regex": "|".join(allowed)}[kind]
        structured = StructuredOutputsParams(**{kind: constraint})
        outputs = generate(llm, PROMPTS, MIXED, structured_outputs=structured, ignore_eos=False, max_tokens=4)

        def likeliest(expressions: Sequence[str | None]) -> list[int]:
            rows = zip(PROMPTS, expressions, strict=True)
            return [ids[reference.logprobs(p, e)[-1, ids].argmax()].item() for p, e in rows]

        assert [tokens[0] for tokens in tokens_of(outputs)] == likeliest(MIXED) != likeliest(UNSTEERED)

    @pytest.mark.both_runners
    def test_stop_strings_and_minimum_lengths(self, llm: Any, reference: Reference, llama: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(llama)
        full = reference.tokens(PROMPTS[3], "vqa")
        stop = full[4]
        word = tokenizer.decode([stop])
        assert stop not in full[:4]
        (tokens,) = answers(llm, [PROMPTS[3]], ["vqa"], stop=[word])
        assert tokens == full[:5]
        (tokens,) = answers(llm, [PROMPTS[3]], ["vqa"], stop_token_ids=[stop], min_tokens=8)
        assert tokens[:8] == greedy_without(stop, reference, PROMPTS[3], "vqa", 8)
        assert 8 <= len(tokens) <= NEW_TOKENS

    def test_sleep_is_nothing_on_a_cpu(self, llm: Any, reference: Reference) -> None:
        """VLLM's CPU worker ignores sleep mode, so steering stays as it is."""
        llm.sleep()
        llm.wake_up()
        assert answers(llm, PROMPTS, MIXED) == reference.answers(PROMPTS, MIXED)


@pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPendingDeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning")
@pytest.mark.both_runners
def test_n_gram_speculation(llama: Path, profiles: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steered model checks the drafts, so tokens are the same as without speculation."""
    from vllm.triton_utils import dispatcher

    # vLLM looks at all objects of all modules, and numba, which proposes the drafts, has one whose __dict__ is none.
    safe = lambda value: value.__dict__ if type(value).__dictoffset__ else {}  # noqa: E731
    monkeypatch.setattr(dispatcher, "vars", safe, raising=False)
    looping = [(prompt * 6)[:24] for prompt in PROMPTS]  # so that there is something to speculate from
    expected = reference.answers(looping, MIXED)
    assert changed(expected, reference.answers(looping, UNSTEERED), MIXED) >= 0.8
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(llama, profiles, speculative_config=speculative, disable_log_stats=False) as llm:
        assert answers(llm, looping, MIXED) == expected
        metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    assert metrics["vllm:spec_decode_num_draft_tokens"] > 0
