"""The shipped checkpoint: complete, small, named as vLLM wants, and able to do its tasks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hones_offline.data.metrics import anls, bleu4, vqa_accuracy
from hones_offline.data.scenes import Scene, scenes
from hones_offline.running import embedded
from hones_offline.running.embedded import checkpoint, load_tiny_vlm
from safetensors.numpy import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hones_steer.errors import DataError


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_tiny_vlm()


def rendered(processor: Any, prompt: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def encode(processor: Any, pictures: list[Scene], prompts: list[str]) -> Any:
    texts = [rendered(processor, prompt) for prompt in prompts]
    images = [scene.image() for scene in pictures]
    return processor(images=images, text=texts, padding=True, return_tensors="pt")


def answers(loaded: tuple[Any, Any], pictures: list[Scene], task: str) -> list[str]:
    model, processor = loaded
    inputs = encode(processor, pictures, [scene.prompt(task) for scene in pictures])
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    return list(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_it_loads_with_the_auto_classes_and_every_weight_finds_its_place() -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(checkpoint(), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(AutoProcessor.from_pretrained(checkpoint())).__name__ == "LlavaProcessor"


def test_it_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in checkpoint().iterdir()}
    assert {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } == {name for name in files if not name.startswith(".")}
    assert sum(files.values()) <= 8 * 2**20


def test_weights_are_named_as_in_the_release_that_vllm_reads() -> None:
    names = list(load_file(checkpoint() / "model.safetensors"))
    prefixes = (
        "language_model.model.",
        "language_model.lm_head.",
        "multi_modal_projector.",
        "vision_tower.vision_model.",
    )
    assert all(name.startswith(prefixes) for name in names)
    assert all(any(name.startswith(prefix) for name in names) for prefix in prefixes)


def test_heads_are_wide_enough_for_vllm(loaded: tuple[Any, Any]) -> None:
    text = loaded[0].config.text_config
    assert text.head_dim >= 32
    assert text.num_attention_heads >= 4


def test_no_beginning_token_is_doubled_and_answers_tokenize_alone_as_in_context(
    loaded: tuple[Any, Any],
) -> None:
    """Attribution builds u_y, and fitting its labels, from the answer's tokens alone."""
    _, processor = loaded
    tokenizer = processor.tokenizer
    for scene in scenes("dev", 20):
        for task, answer in {"vqa": scene.answer, "ocr": scene.text, "caption": scene.captions[0]}.items():
            prompt = rendered(processor, scene.prompt(task))
            alone = tokenizer.encode(answer, add_special_tokens=False)
            assert tokenizer.encode(prompt + answer) == tokenizer.encode(prompt) + alone
            assert tokenizer.decode(alone) == answer
        assert len(tokenizer.encode(scene.text)) == len(scene.text)


def test_one_picture_takes_sixteen_image_tokens(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    inputs = encode(processor, scenes("dev", 1), ["Describe the image in one sentence."])
    assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == 16


def test_it_does_its_generating_tasks(loaded: tuple[Any, Any]) -> None:
    """Scores lie far above those of a model that does not look (model card), and leave room for steering."""
    pictures = scenes("dev", 60)
    vqa = [vqa_accuracy(a, [s.answer]) for a, s in zip(answers(loaded, pictures, "vqa"), pictures, strict=True)]
    ocr = [anls(a, [s.text]) for a, s in zip(answers(loaded, pictures, "ocr"), pictures, strict=True)]
    assert sum(vqa) / len(vqa) > 0.45
    assert sum(ocr) / len(ocr) > 0.8
    assert bleu4(answers(loaded, pictures, "caption"), [s.captions for s in pictures]) > 0.8


def test_it_tells_true_captions_from_false_ones(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    yes, no = (processor.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No"))
    right = 0
    for scene in scenes("dev", 20):
        prompts = [scene.prompt("retrieval", candidate) for candidate in scene.candidates(4)]
        with torch.no_grad():
            logits = model(**encode(processor, [scene] * 5, prompts)).logits[:, -1]
        right += int((logits[:, yes] - logits[:, no]).argmax()) == 0
    assert right >= 10  # four are expected of a blind guess


def test_it_looks_at_the_picture(loaded: tuple[Any, Any]) -> None:
    pictures = scenes("dev", 20)
    read = answers(loaded, pictures, "ocr")
    assert sum(a == s.text for a, s in zip(read[1:] + read[:1], pictures, strict=True)) <= 1
    assert len(set(read)) >= 18


def test_a_missing_checkpoint_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_FOLDERS", (tmp_path,))
    with pytest.raises(DataError, match=r"has no model\.safetensors; reinstall"):
        checkpoint()
