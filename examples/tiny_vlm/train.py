"""Train the embedded vision-language model from nothing (about 45 minutes on two CPU cores).

    OMP_NUM_THREADS=2 python -m examples.tiny_vlm.train --output examples/tiny_vlm/checkpoint

Run it from the repository root. Two stages, both on the train split of `hones_offline.data.scenes`:

1. the vision tower with dense labels: which shape and color stands in each cell, which text in the box;
2. the whole model on the four tasks; the loss is the mean cross-entropy of the answer's tokens, averaged
   over the tasks.

The tower goes first because without that stage training sits on a plateau for thousands of steps. Training
stops at --steps, before the tasks are perfect: without room for improvement nothing shows what steering does.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hones_offline.data import scenes as scene_data
from hones_offline.data.scenes import CHARACTERS, COLORS, SHAPES, Scene, scenes
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from examples.tiny_vlm.evaluate_card import measure

PATCH = 16
_TOKENIZER: Any = PreTrainedTokenizerFast  # these two constructors have no annotations
_PROCESSOR: Any = LlavaProcessor


@dataclass(frozen=True)
class Phase:
    """A stretch of stage 2: how many examples of each task a step has, and what is trained."""

    until: int
    batch: dict[str, int]
    ocr_every: int = 1
    """Reading is learned first; then only every so many steps have it, or it would leave no headroom."""
    tower: bool = True
    """Whether the vision tower is trained as well."""


PHASES = (
    Phase(300, {"vqa": 24, "ocr": 12, "caption": 6, "retrieval": 20}, tower=False),
    Phase(600, {"vqa": 24, "ocr": 12, "caption": 6, "retrieval": 20}, ocr_every=8, tower=False),
    Phase(1200, {"vqa": 20, "ocr": 10, "caption": 12, "retrieval": 14}, ocr_every=4),
    Phase(1_000_000, {"vqa": 32, "ocr": 10, "caption": 4, "retrieval": 14}, ocr_every=4),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def build_processor(examples: list[Scene]) -> LlavaProcessor:
    """A byte-level BPE, trained on the scenes' own language; text in the box is one token per character."""
    tokenizer = Tokenizer(models.BPE())
    capitals = pre_tokenizers.Split(Regex("[A-Z0-9](?![a-z])"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [capitals, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "</s>", "<image>", "<user>", "<assistant>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [text for scene in examples for task in scene_data.TASKS for text in _example(scene, task, 0)]
    tokenizer.train_from_iterator(corpus + [c for scene in examples for c in scene.captions], trainer)
    fast = _TOKENIZER(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    side = scene_data.IMAGE_SIZE
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    processor: LlavaProcessor = _PROCESSOR(
        images,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return processor


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """LLaVA-1.5's architecture with 3.3 million parameters; vLLM needs head_dim >= 32."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=scene_data.IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(scene_data.IMAGE_SIZE // PATCH) ** 2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model


# Stage 1: the vision tower


def pretrain_vision(model: LlavaForConditionalGeneration, examples: list[Scene], pixels: Tensor, steps: int) -> None:
    """Teach the tower what stands where; the linear head on all its patch states is thrown away."""
    tower = model.model.vision_tower
    labels = torch.tensor([_labels(scene) for scene in examples])  # [N, 6 + 6 + 4]
    sizes = [len(SHAPES) + 1] * 6 + [len(COLORS) + 1] * 6 + [len(CHARACTERS) + 1] * 4
    head = nn.Linear(model.config.image_seq_length * 128, sum(sizes))
    rng = np.random.default_rng(0)

    def loss_of_step(_step: int) -> Tensor:
        rows = torch.from_numpy(rng.integers(0, len(examples), 64))
        logits = head(_features(model, pixels[rows]).flatten(1)).split(sizes, dim=1)
        losses = [nn.functional.cross_entropy(part, labels[rows, i]) for i, part in enumerate(logits)]
        return torch.stack(losses).mean()

    _optimize([*tower.parameters(), *head.parameters()], loss_of_step, steps, "vision")


def _labels(scene: Scene) -> list[int]:
    shapes = [0 if thing is None else 1 + SHAPES.index(thing[1]) for thing in scene.cells]
    colors = [0 if thing is None else 1 + list(COLORS).index(thing[0]) for thing in scene.cells]
    characters = [1 + CHARACTERS.index(character) for character in scene.text]
    return shapes + colors + characters + [0] * (4 - len(characters))


def _features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """uint8[n, 64, 64, 3] -> the patch states that the projector reads, [n, 16, 128]."""
    values = (pixels.float() / 255 - 0.5) / 0.5
    states: Tensor = model.model.vision_tower(values.permute(0, 3, 1, 2)).last_hidden_state
    return states[:, 1:]


# Stage 2: the four tasks


def train_tasks(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    examples: list[Scene],
    pixels: Tensor,
    steps: int,
    first: int,
    checkpoint: Callable[[int], None],
) -> None:
    """Train the whole model on the examples and their pictures, uint8[N, 64, 64, 3]."""
    rng = random.Random(first)
    language = model.model.language_model
    image_token = model.config.image_token_index

    def loss_of_task(task: str, phase: Phase) -> Tensor:
        rows = [rng.randrange(len(examples)) for _ in range(phase.batch[task])]
        tokens, answer = _batch(processor, [_example(examples[i], task, rng.getrandbits(32)) for i in rows])
        embeddings = language.embed_tokens(tokens)
        with torch.set_grad_enabled(phase.tower):
            features = _features(model, pixels[torch.tensor(rows)])
        images = model.model.multi_modal_projector(features)
        embeddings = embeddings.masked_scatter((tokens == image_token)[:, :, None], images)
        # Padding is on the right and attention is causal, so no mask is needed.
        hidden = language(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][answer[:, 1:]])  # [answer tokens, vocabulary]
        return nn.functional.cross_entropy(logits, tokens[:, 1:][answer[:, 1:]])

    def loss_of_step(step: int) -> Tensor:
        phase = next(phase for phase in PHASES if step <= phase.until)
        tasks = [task for task in phase.batch if task != "ocr" or step % phase.ocr_every == 0]
        return torch.stack([loss_of_task(task, phase) for task in tasks]).mean()

    _optimize(model.parameters(), loss_of_step, steps, "tasks", first, checkpoint)


def _example(scene: Scene, task: str, draw: int) -> tuple[str, str]:
    """(prompt, answer). `draw` picks retrieval's candidate: half true, half false."""
    if task == "retrieval":
        true, *false = scene.candidates(10)
        candidate = true if draw % 2 else false[draw // 2 % len(false)]
        return scene.prompt(task, candidate), "Yes" if draw % 2 else "No"
    answer = {"vqa": scene.answer, "ocr": scene.text, "caption": scene.captions[0]}[task]
    return scene.prompt(task), answer


def _batch(processor: LlavaProcessor, examples: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Tokens [n, T], padded on the right, and which of them are the answer's, its </s> included."""
    tokenizer, images = processor.tokenizer, "<image>" * (scene_data.IMAGE_SIZE // PATCH) ** 2
    rows, starts = [], []
    for prompt, answer in examples:
        before = tokenizer.encode(f"<user>{images}{prompt}<assistant>", add_special_tokens=False)
        starts.append(len(before))
        rows.append(before + tokenizer.encode(f"{answer}</s>", add_special_tokens=False))
    tokens = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    answer_mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[i, : len(row)] = torch.tensor(row)
        answer_mask[i, start : len(row)] = True
    return tokens, answer_mask


# Both stages


def _optimize(
    trained: Iterable[nn.Parameter],
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    name: str,
    first: int = 0,
    checkpoint: Callable[[int], None] | None = None,
) -> None:
    """AdamW 1e-3, 200 steps of warm-up, then cosine to 5%."""
    parameters = list(trained)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(first + step, steps, first))
    started, recent = time.monotonic(), list[float]()
    for step in range(first + 1, steps + 1):
        loss = loss_of_step(step)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % 50 == 0:
            mean, recent = sum(recent) / len(recent), []
            _log(f"{name} step {step}/{steps} loss {mean:.4f} {time.monotonic() - started:.0f} s")
        if checkpoint is not None:
            checkpoint(step)


def _rate(step: int, steps: int, first: int) -> float:
    if step < 200:
        return (step + 1) / 200
    warm = min(1.0, (step + 1 - first) / 50)  # a resumed run starts with an empty optimizer
    progress = (step - 200) / max(1, steps - 200)
    return warm * float(0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * min(1.0, progress))))


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write a complete float16 checkpoint with the key names of LLaVA-1.5's release, which vLLM reads too."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    half = LlavaForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    nn.Module.half(half)
    half.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file({released_name(k): v for k, v in load_file(weights).items()}, weights, {"format": "pt"})


def released_name(key: str) -> str:
    """Transformers 5 drops the level `vision_model`; LLaVA-1.5's files and vLLM have it."""
    inner = key.removeprefix("vision_tower.")
    if inner == key or inner.startswith("vision_model."):
        return key
    return f"vision_tower.vision_model.{inner}"


def main() -> None:
    """Train, log to stderr, leave a checkpoint in --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the final checkpoint")
    parser.add_argument("--scenes", type=int, default=32000, help="training pictures")
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--vision", type=Path, help="take the tower from this checkpoint and skip stage 1")
    parser.add_argument("--resume", type=Path, help="go on with stage 2 from this checkpoint, a --snapshots one")
    parser.add_argument("--steps", type=int, default=3300, help="steps of stage 2")
    parser.add_argument("--snapshots", type=Path, help="folder for a checkpoint every 300 steps, measured on dev")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    examples = scenes("train", args.scenes, args.seed)
    pixels = torch.from_numpy(_stack(examples))
    _log(f"{len(examples)} training scenes")
    processor = build_processor(examples[:4000]) if args.resume is None else _load_processor(args.resume)
    model = build_model(processor)
    _log(f"{sum(p.numel() for p in model.parameters())} parameters, {len(processor.tokenizer)} tokens")
    if args.vision is not None:
        model.model.vision_tower.load_state_dict(_load(args.vision).model.vision_tower.state_dict())
    else:
        pretrain_vision(model, examples, pixels, args.vision_steps)
    if args.snapshots is not None:
        save(model, processor, args.snapshots / "vision")
    dev = scenes("dev", 60, args.seed)

    def checkpoint(step: int) -> None:
        if args.snapshots is not None and step % 300 == 0:
            save(model, processor, args.snapshots / f"{step:05d}")
            _log(f"tasks step {step} dev {measure(model, processor, dev)}")

    first = 0
    if args.resume is not None:
        model.load_state_dict(_load(args.resume).state_dict())
        first = int(args.resume.name)
    train_tasks(model, processor, examples, pixels, args.steps, first, checkpoint)
    save(model, processor, args.output)
    _log(f"saved to {args.output}")


def _load(folder: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def _load_processor(folder: Path) -> LlavaProcessor:
    processor: LlavaProcessor = LlavaProcessor.from_pretrained(folder)
    return processor


def _stack(examples: list[Scene]) -> NDArray[np.uint8]:
    return np.stack([scene.pixels() for scene in examples])


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
