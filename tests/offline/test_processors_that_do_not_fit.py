"""A processor or tokenizer of another model is refused before any work, with what does not fit."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_processors
from hones_offline import attribute
from hones_offline.running.prompts import prepare
from problems import problem

from hones_steer.errors import DataError

SAVED = "use the processor that was saved with the model$"


def refused(model: Any, processor: Any, message: str, task: str = "vqa") -> None:
    p = problem("llava" if task == "vqa" else "llama", task, count=2)
    model.generation_config.eos_token_id = 2
    with pytest.raises(DataError, match=message):
        prepare(model, processor, p.task, p.examples)


def llava_processor(**changes: Any) -> Any:
    """The processor of the tiny LLaVA with some attributes changed."""
    processor = tiny_processors.llava_processor(tiny_models.llava().config)
    for name, value in changes.items():
        setattr(processor, name, value)
    return processor


def test_an_image_for_a_text_model_that_would_ignore_it(tmp_path: Path) -> None:
    """Llama takes any keyword argument, and would read the prompt alone."""
    p = problem("llava", "vqa", count=2)
    model = tiny_models.llama()
    model.generation_config.eos_token_id = 2
    message = (
        r"LlavaProcessor makes pixel_values \[1, 3, 16, 16\] of an image and its prompt, which LlamaForCausalLM does"
    )
    with pytest.raises(DataError, match=message):
        attribute(
            model, p.processor, p.task, p.examples, method="hones", head_metric="logprob", run_dir=tmp_path / "run"
        )
    assert list(tmp_path.iterdir()) == []


def test_another_number_of_image_tokens() -> None:
    processor = llava_processor(patch_size=4)
    message = r"LlavaForConditionalGeneration does not run on what LlavaProcessor makes of an image and its prompt"
    refused(
        tiny_models.llava(),
        processor,
        rf"{message} \(.*pixel_values \[1, 3, 16, 16\].*tokens: 16, features: \d+; {SAVED}",
    )


def test_another_image_token() -> None:
    other = tiny_models.llava().config
    other.image_token_id = 5
    processor = tiny_processors.llava_processor(other)
    refused(
        tiny_models.llava(),
        processor,
        rf"Image features and image tokens do not match, tokens: \d+, features: \d+; {SAVED}",
    )


def test_a_processor_of_another_kind_of_images() -> None:
    processor = tiny_processors.qwen2_5_vl_processor(tiny_models.qwen2_5_vl().config)
    refused(tiny_models.llava(), processor, "(Qwen2_5_VLProcessor makes|ImageOnly makes|does not run on what)")


def test_a_processor_that_makes_nothing_of_images() -> None:
    class Blind:
        tokenizer = llava_processor().tokenizer
        image_processor = object()
        chat_template = None
        image_token = "<image>"

        def __call__(self, images: Any, text: Any, **options: Any) -> Any:  # noqa: ARG002
            return self.tokenizer(text, **options)

    refused(tiny_models.llava(), Blind(), f"Blind makes only input_ids, .*LlavaFor.* would not see the image; {SAVED}")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (
            "blip2",
            r"Blip2\w+ does not run on a prompt alone \(.*missing .*'pixel_values'; give each example what it needs",
        ),
        (
            "idefics",
            r"Idefics\w+ writes nothing after a prompt of these examples \(.*pixel_values.*; give each example what",
        ),
    ],
)
def test_a_model_that_does_not_run_without_an_image(architecture: str, message: str) -> None:
    p = problem(architecture, "text", count=2)
    with pytest.raises(DataError, match=message):
        prepare(p.model, p.processor, p.task, p.examples)


def test_a_tokenizer_with_more_tokens_than_the_model() -> None:
    tokenizer = tiny_processors.text_tokenizer(tiny_models.llama(vocab_size=12).config)
    known = len(tokenizer)
    assert known == 12
    larger = tiny_processors.text_tokenizer(tiny_models.llama().config)
    message = r"token \d of a prompt is \d+ \('\w+'\), but LlamaForCausalLM knows the ids 0 to 11; use the tokenizer"
    refused(tiny_models.llama(vocab_size=12), larger, message, "text")
