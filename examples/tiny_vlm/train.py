"""Train the embedded vision-language model from nothing.

    OMP_NUM_THREADS=2 python -m examples.tiny_vlm.train --run runs/tiny_vlm --output examples/tiny_vlm/checkpoint

Run it from the repository root. Two stages, both on the train split of `hones_offline.data.scenes`:

1. the vision tower with dense labels: which shape and color stands in each cell, which text in the box;
2. the whole model on the four tasks, asked for in the wordings of `mixture.py`; the loss is the mean cross-entropy of
   the answers' tokens, averaged over the tasks.

The tower goes first because without that stage training sits on a plateau for thousands of steps. What a step draws
depends on --seed and the step alone, and every --keep-every steps all else is kept in the folder --run: killed and
started again, training goes on from there and gives the same model.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hones_offline.data import scenes as scene_data
from hones_offline.data.scene_language import COLORS, SHAPES
from hones_offline.data.scenes import CHARACTERS, TASKS, Scene, scenes
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

from examples.tiny_vlm.mixture import Sample, draw
from examples.tiny_vlm.muon import Muon
from hones_steer.files import write_atomically

PATCH = 16
IMAGE_TOKENS = (scene_data.IMAGE_SIZE // PATCH) ** 2
MUON_LR, ADAM_LR, WARM_UP = 2e-3, 5e-3, 100
_TOKENIZER: Any = PreTrainedTokenizerFast  # these two constructors have no annotations
_PROCESSOR: Any = LlavaProcessor


@dataclass(frozen=True)
class Phase:
    """A stretch of stage 2: how many pictures a step has, how often each is asked about, and what is trained."""

    until: int
    pictures: int
    samples: Mapping[str, int]
    """How many prompts of each task a picture has."""
    tower: bool = True
    """Whether the vision tower is trained as well."""


PHASES = (
    Phase(1000, 4, {"vqa": 4, "ocr": 1, "caption": 2, "retrieval": 2}, tower=False),
    Phase(1800, 8, {"vqa": 4, "ocr": 1, "caption": 1, "retrieval": 2}, tower=False),
    Phase(1_000_000, 12, {"vqa": 4, "ocr": 1, "caption": 1, "retrieval": 2}),
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


def build_processor(examples: Sequence[Scene]) -> LlavaProcessor:
    """A byte-level BPE, trained on the mixture's language; text in the box is one token per character."""
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
    rng = random.Random(0)
    corpus = [text for scene in examples for task in 2 * TASKS for text in draw(scene, task, rng)]
    tokenizer.train_from_iterator(corpus, trainer)
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
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model


# Stage 1: the vision tower


class VisionHeads(nn.Module):
    """Linear heads that read one thing from one patch state each; they are thrown away after stage 1.

    The first six states learn to hold what stands in the six cells, the next four the characters. So the language model
    finds each thing in a place of its own, whichever patches it lies on.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shapes = nn.Linear(width, 1 + len(SHAPES))
        self.colors = nn.Linear(width, 1 + len(COLORS))
        self.characters = nn.Linear(width, 1 + len(CHARACTERS))

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        """Average the cross-entropies; states are [n, 16, width], labels int64 [n, 16] as `labels_of` gives them."""
        cells, text = states[:, :6], states[:, 6:10]
        logits = [self.shapes(cells), self.colors(cells), self.characters(text)]
        parts = zip(logits, labels.split([6, 6, 4], dim=1), strict=True)
        return torch.stack([nn.functional.cross_entropy(row.flatten(0, 1), own.flatten()) for row, own in parts]).mean()


def labels_of(scene: Scene) -> list[int]:
    """Each cell's shape, then each cell's color, then the characters; 0 stands for none."""
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


class Packed(NamedTuple):
    """Pictures, each with several prompts and answers behind it in one row, padded on the right.

    A prompt sees the picture and itself, at the positions that it has alone, so that a row gives what its prompts would
    give one by one; the picture runs once.
    """

    tokens: Tensor
    """[n, T]."""
    positions: Tensor
    """[n, T]."""
    mask: Tensor
    """Which position attends to which, bool[n, 1, T, T]."""
    answers: Tensor
    """The number of the task that a token of an answer, its end included, belongs to, from 1; else 0. [n, T]."""


def pack(processor: LlavaProcessor, pictures: Sequence[Sequence[tuple[str, Sample]]]) -> Packed:
    """Pack each picture's (task, sample) pairs."""
    tokenizer = processor.tokenizer
    picture = tokenizer.encode(f"<user>{'<image>' * IMAGE_TOKENS}", add_special_tokens=False)
    rows: list[list[list[int]]] = []  # picture -> token, position, segment, task
    for samples in pictures:
        row = [[token, i, 0, 0] for i, token in enumerate(picture)]
        for segment, (task, (prompt, answer)) in enumerate(samples, start=1):
            asked = tokenizer.encode(f"{prompt}<assistant>", add_special_tokens=False)
            said = tokenizer.encode(f"{answer}</s>", add_special_tokens=False)
            tasks = [0] * len(asked) + [1 + TASKS.index(task)] * len(said)
            places = range(len(picture), len(picture) + len(tasks))
            row += [list(column) for column in zip(asked + said, places, [segment] * len(tasks), tasks, strict=True)]
        rows.append(row)
    length = max(map(len, rows))
    padding = [tokenizer.pad_token_id, 0, -1, 0]
    table = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
    tokens, positions, segments, answers = table.unbind(-1)
    mine = segments[:, :, None] == segments[:, None, :]
    mask = (mine | (segments[:, None, :] == 0)) & torch.ones(length, length, dtype=torch.bool).tril()
    return Packed(tokens, positions, mask[:, None], answers)


def task_losses(model: LlavaForConditionalGeneration, packed: Packed, pixels: Tensor, *, tower: bool = True) -> Tensor:
    """The mean cross-entropy of the answers' tokens of each task that there is, [tasks]."""
    language = model.model.language_model
    with torch.set_grad_enabled(tower):
        features = _features(model, pixels)
    images = model.model.multi_modal_projector(features)
    is_image = packed.tokens == model.config.image_token_index
    embeddings = language.embed_tokens(packed.tokens).masked_scatter(is_image[:, :, None], images)
    hidden = language(
        inputs_embeds=embeddings, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    tasks = packed.answers[:, 1:]
    logits = model.lm_head(hidden[:, :-1][tasks > 0])  # [answer tokens, vocabulary]
    losses = nn.functional.cross_entropy(logits, packed.tokens[:, 1:][tasks > 0], reduction="none")
    return torch.stack([losses[tasks[tasks > 0] == task].mean() for task in tasks[tasks > 0].unique()])


# Both stages


class Training:
    """A stage's optimization, whose state can be kept: Muon for the weights of linear layers, AdamW for all others.

    Both have 100 steps of warm-up, then cosine to 5%. Muon needs half of AdamW's steps here.
    """

    def __init__(self, name: str, modules: Mapping[str, nn.Module], steps: int, folder: Path) -> None:
        self.name, self.modules, self.steps = name, dict(modules), steps
        self.file = folder / f"{name}.pt"
        self.parameters = [parameter for module in modules.values() for parameter in module.parameters()]
        matrices = _hidden_matrices(modules.values())
        known = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in self.parameters if id(parameter) not in known]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=MUON_LR, weight_decay=0.01),
            torch.optim.AdamW(others, lr=ADAM_LR, weight_decay=0.01),
        ]
        self.done = 0
        if self.file.is_file():
            self._restore(torch.load(self.file, weights_only=True))

    def run(
        self, loss_of_step: Callable[[int], Tensor], keep_every: int, measure: Callable[[int], str] = lambda _: ""
    ) -> None:
        """Train to the end; `loss_of_step` is given the step, from 1. `measure` tells more for the log."""
        started, recent = time.monotonic(), list[float]()
        for step in range(self.done + 1, self.steps + 1):
            loss = loss_of_step(step)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            for optimizer, lr in zip(self.optimizers, (MUON_LR, ADAM_LR), strict=True):
                optimizer.param_groups[0]["lr"] = lr * rate(step, self.steps)
                optimizer.step()
            self.done = step
            recent.append(loss.item())
            if step % 50 == 0:
                mean, recent = sum(recent) / len(recent), []
                seconds = time.monotonic() - started
                _log(f"{self.name} step {step}/{self.steps} loss {mean:.4f} {seconds:.0f} s {measure(step)}")
            if step % keep_every == 0 or step == self.steps:
                self.keep()

    def keep(self) -> None:
        """Write the state, so that a run that is killed goes on from here."""
        modules = {name: module.state_dict() for name, module in self.modules.items()}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        file = io.BytesIO()
        torch.save({"modules": modules, "optimizers": optimizers, "step": self.done}, file)
        write_atomically(self.file, file.getvalue())

    def _restore(self, state: Mapping[str, Any]) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.done = state["step"]
        _log(f"{self.name} goes on after step {self.done}")


def _hidden_matrices(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The weights of linear layers between hidden states: all but those that make logits."""
    return [
        layer.weight
        for module in modules
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head" and not isinstance(module, VisionHeads)
    ]


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, from 1, as a share of the highest."""
    if step <= WARM_UP:
        return step / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return float(0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * progress)))


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


def train(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Train both stages, from where they were left in `args.run`."""
    examples = scenes("train", args.scenes, args.seed)
    pixels = torch.from_numpy(_stack(examples))
    _log(f"{len(examples)} training scenes")
    config: Any = model.config.vision_config
    heads = VisionHeads(config.hidden_size)
    labels = torch.tensor([labels_of(scene) for scene in examples])

    def vision_step(step: int) -> Tensor:
        rows = torch.tensor(random.Random(f"vision/{args.seed}/{step}").choices(range(len(examples)), k=64))
        loss: Tensor = heads(_features(model, pixels[rows]), labels[rows])
        return loss

    def tasks_step(step: int) -> Tensor:
        rng = random.Random(f"tasks/{args.seed}/{step}")
        phase = next(phase for phase in PHASES if step <= phase.until)
        rows = rng.choices(range(len(examples)), k=phase.pictures)
        asked = [task for task, count in phase.samples.items() for _ in range(count)]
        packed = pack(processor, [[(task, draw(examples[i], task, rng)) for task in asked] for i in rows])
        return task_losses(model, packed, pixels[torch.tensor(rows)], tower=phase.tower).mean()

    tower = {"tower": model.model.vision_tower, "heads": heads}
    Training("vision", tower, args.vision_steps, args.run).run(vision_step, args.keep_every)
    Training("tasks", {"model": model}, args.steps, args.run).run(tasks_step, args.keep_every)


def main() -> None:
    """Train, log to stderr, leave a checkpoint in --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the state, to go on from")
    parser.add_argument("--output", type=Path, required=True, help="folder of the final checkpoint")
    parser.add_argument("--scenes", type=int, default=32000, help="training pictures")
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=6000, help="steps of stage 2")
    parser.add_argument("--keep-every", type=int, default=200, help="steps between two states that are kept")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    processor = build_processor(scenes("train", 4000, args.seed))
    model = build_model(processor)
    _log(f"{sum(p.numel() for p in model.parameters())} parameters, {len(processor.tokenizer)} tokens")
    train(model, processor, args)
    save(model, processor, args.output)
    _log(f"saved to {args.output}")


def _stack(examples: list[Scene]) -> NDArray[np.uint8]:
    return np.stack([scene.pixels() for scene in examples])


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
