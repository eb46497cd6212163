"""Steered vLLM engines for tests, and the answers of transformers with the same profiles.

Prompts are lists of token ids, or ``(text, image)`` pairs for a model with vision.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from serving.engines import V2, offline
from tiny_models import random_profile
from transformers import AutoModelForCausalLM

from hones_steer import Profile, save_profile, steer

Prompt = list[int] | tuple[str, Image.Image]

TASKS = ("cap", "ocr", "vqa")
# A mixed batch: no task and "none", tasks, a blend, a strength, a negative strength; as one step lays them out,
# some neighbors are steered alike.
MIXED = (None, "vqa", "ocr", "vqa@0.5+ocr", "none", "cap@0.5", "vqa@-1", "vqa")
NEW_TOKENS = 12
KV_CACHE_BYTES = 1 << 26  # of an engine: thousands of tokens


def words(length: int, seed: int = 5) -> list[int]:
    """A prompt of plain words."""
    return torch.randint(10, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompts(count: int, longest: int = 20) -> list[list[int]]:
    """Different prompts, 3 to `longest` tokens long."""
    return [words(3 + i * (longest - 3) // max(1, count - 1), seed=i) for i in range(count)]


def write_profiles(model: Any, folder: Path, fraction: float = 0.3) -> dict[str, Profile]:
    """Write a folder of profiles, one for each of TASKS, random scales for a share of all neurons; returns them."""
    folder.mkdir()
    profiles = {task: random_profile(model, seed, task, fraction) for seed, task in enumerate(TASKS)}
    for task, profile in profiles.items():
        save_profile(profile, folder / f"{task}.safetensors")
    return profiles


class Reference:
    """Answers of transformers, one request at a time, steered by `hones_steer.steer` with a folder of profiles.

    Made before an engine that compiles: attaching the steering makes PyTorch forget compiled code.
    """

    def __init__(self, model: Any, folder: Path, processor: Any = None) -> None:
        model.generation_config.eos_token_id = None  # end tokens end nothing
        self.model = model.eval()
        self.steering = steer(model, {file.stem: file for file in sorted(folder.glob("*.safetensors"))})
        self._processor = processor

    def tokens(self, prompt: Prompt, expression: str | None, count: int = NEW_TOKENS, scope: str = "all") -> list[int]:
        """The next `count` tokens of greedy decoding."""
        inputs = self._inputs(prompt)
        with torch.no_grad(), self.steering.task(expression or "none", scope=scope):
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=count)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    def answers(self, prompts: Sequence[Prompt], expressions: Sequence[str | None]) -> list[list[int]]:
        """The tokens of each request."""
        return [self.tokens(p, e) for p, e in zip(prompts, expressions, strict=True)]

    def logprobs(self, ids: Sequence[int], expression: str | None) -> torch.Tensor:
        """Log-probabilities `[len(ids), vocabulary]`; row i is for the token after ids[i]."""
        with torch.no_grad(), self.steering.task(expression or "none"):
            logits = self.model(torch.tensor([ids])).logits[0]
        return logits.float().log_softmax(-1)

    def _inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        if isinstance(prompt, list):
            ids = torch.tensor([prompt])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        text, image = prompt
        return dict(self._processor(images=image, text=text, return_tensors="pt"))


@dataclass(frozen=True)
class Case:
    """A checkpoint, profiles of it, the requests of a mixed batch, and the tokens that transformers gives to each."""

    folder: Path
    model: Any
    of: dict[str, Profile]
    asked: Sequence[Prompt]
    expected: list[list[int]]

    @property
    def profiles(self) -> Path:
        """Folder of the profiles."""
        return self.folder / "profiles"


def case_of(folder: Path, model: Any, asked: Sequence[Prompt], processor: Any = None) -> Case:
    """Write profiles for the model that was loaded from `folder`, and have it answer the requests."""
    of = write_profiles(model, folder / "profiles", fraction=0.5)
    return Case(folder, model, of, asked, expected_tokens(Reference(model, folder / "profiles", processor), asked))


def expected_tokens(reference: Reference, asked: Sequence[Prompt]) -> list[list[int]]:
    """The reference's tokens for a mixed batch, few of them those of unsteered requests; then its model is plain."""
    tokens = reference.answers(asked, MIXED)
    assert changed(tokens, reference.answers(asked, [None] * len(MIXED)), MIXED) >= 0.8
    reference.steering.detach()
    return tokens


@contextmanager
def engine(model: Path, profiles: Path | None, env: Mapping[str, str] | None = None, **options: Any) -> Iterator[Any]:
    """An engine of `engines.offline`, with HONES_PROFILES set to a folder; None: without hones-steer.

    Which model runner it has is vLLM's choice, and must be the process's. Several workers have a process each.
    """
    import vllm.plugins

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HONES_PROFILES", raising=False)
        patch.setenv("VLLM_PLUGINS", "hones" if profiles else "none")
        if profiles:
            patch.setenv("HONES_PROFILES", str(profiles))
        patch.delenv("VLLM_CPU_KVCACHE_SPACE")  # in GiB, which take half a second to fill with zeros
        stages, ranks = (options.get(f"{kind}_parallel_size", 1) for kind in ("pipeline", "tensor"))
        if stages * ranks > 1:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        patch.setattr(vllm.plugins, "plugins_loaded", False)  # vLLM looks once per process
        with offline(model, **{"kv_cache_memory_bytes": KV_CACHE_BYTES, **options}) as llm:
            assert llm.llm_engine.vllm_config.use_v2_model_runner == V2
            if stages > 1 and not V2 and options.get("enforce_eager", True):
                # The V1 runner makes room for what a stage hands on as it warms up, and on a CPU no eager model does.
                llm.collective_rpc("execute_dummy_batch")
            yield llm


def schedule_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have engines schedule each step before the one before it has finished, which vLLM does not do on a CPU."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def update_and_switch_on(config: Any) -> None:
        update(config)
        config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(update_and_switch_on))


def request(prompt: Prompt, **more: Any) -> dict[str, Any]:
    """A prompt as vLLM takes it; `more` has further fields, such as cache_salt."""
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt, **more}
    text, image = prompt
    return {"prompt": text, "multi_modal_data": {"image": image}, **more}


def sampling(expression: str | None, scope: str | None = None, **options: Any) -> Any:
    """Greedy SamplingParams for NEW_TOKENS tokens, steered by an expression, of a scope."""
    from vllm import SamplingParams

    extra = {name: value for name, value in (("hones_task", expression), ("hones_scope", scope)) if value is not None}
    greedy = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    return SamplingParams(**{**greedy, **options}, extra_args=extra or None)


def generate(llm: Any, prompts: Sequence[Prompt], expressions: Sequence[str | None], **options: Any) -> list[Any]:
    """Outputs of vLLM for one mixed batch, in order."""
    params = [sampling(expression, **options) for expression in expressions]
    outputs: list[Any] = llm.generate([request(p) for p in prompts], params, use_tqdm=False)
    return outputs


def tokens_of(outputs: Sequence[Any]) -> list[list[int]]:
    """The tokens of each output's first sequence."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def logprobs_of(outputs: Sequence[Any]) -> list[list[dict[int, float]]]:
    """The log-probabilities of each output's first sequence, by token, at each of its positions."""
    return [
        [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]
        for output in outputs
    ]


def answers(llm: Any, prompts: Sequence[Prompt], expressions: Sequence[str | None], **options: Any) -> list[list[int]]:
    """The tokens of one mixed batch."""
    return tokens_of(generate(llm, prompts, expressions, **options))


def answers_alone(llm: Any, prompts: Sequence[Prompt], expressions: Sequence[str | None]) -> list[list[int]]:
    """The tokens of the same requests, one after the other."""
    return [answers(llm, [p], [e])[0] for p, e in zip(prompts, expressions, strict=True)]


def changed(tokens: Sequence[list[int]], unsteered: Sequence[list[int]], expressions: Sequence[str | None]) -> float:
    """The share of steered requests whose tokens differ from the unsteered ones."""
    steered = [a != b for a, b, e in zip(tokens, unsteered, expressions, strict=True) if e not in (None, "none")]
    return sum(steered) / len(steered)


def check_lora(
    model: Path, profiles: Path, adapter: Path, env: Mapping[str, str] | None = None, **options: Any
) -> None:
    """Check mixed batches beside a LoRA of the queries, written to `adapter`; `env` and `options` are `engine`'s.

    The adapter is given to all requests of a batch or to none: on a CPU, vLLM mixes up batches with both.
    """
    from vllm.lora.request import LoRARequest

    asked = prompts(len(MIXED))
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(adapter)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    both = Reference(adapted.merge_and_unload(), profiles).answers(asked, MIXED)
    expected = Reference(AutoModelForCausalLM.from_pretrained(model), profiles).answers(asked, MIXED)
    assert sum(a != b for a, b in zip(both, expected, strict=True)) >= 6
    lora = LoRARequest("lora", 1, str(adapter))
    with engine(model, profiles, env, enable_lora=True, max_lora_rank=8, max_loras=1, **options) as llm:
        assert answers(llm, asked, MIXED) == expected
        params = [sampling(expression) for expression in MIXED]
        outputs = llm.generate([request(p) for p in asked], params, lora_request=lora, use_tqdm=False)
        assert tokens_of(outputs) == both
        assert answers(llm, asked, MIXED) == expected
