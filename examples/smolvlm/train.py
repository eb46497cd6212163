"""Train the vision tower and the projector through the frozen language model, on dense descriptions alone.

    python -m examples.smolvlm.train --text runs/smollm2/model --run runs/smolvlm/first --steps 4000 \
        --output runs/smolvlm/first.safetensors
    python -m examples.smolvlm.train --text runs/smollm2/model --run runs/smolvlm/train --steps 2500 \
        --begin runs/smolvlm/first.safetensors --any-order 0.5

Run each from the repository root, again and again until it says that the training is finished: it stops by itself after
--minutes, and goes on from what it kept in --run. Killed, it loses what came after the last of every --keep-every
steps. However it was interrupted, the same number of threads gives the same bytes, for what a step draws depends on
--seed and the step alone. At the end it writes the file that get_model puts before the language model, or that another
training begins with. The first learns to describe pictures in reading order, the second in any.

This is LLaVA's first stage, in which the model sees no task; the tower begins as the embedded model's and is trained
along. The loss is the mean cross-entropy of the descriptions' tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import pickle
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hones_offline.data.scenes import Scene, scenes
from hones_offline.running.embedded import load_tiny_vlm
from hones_offline.running.models import keep_freed_memory
from hones_offline.running.prompts import render
from torch import Tensor, nn

from examples.smolvlm.descriptions import draw
from examples.smolvlm.get_model import (
    CONNECTOR,
    END,
    IMAGE,
    STATE,
    assemble,
    build,
    identity_of,
    load_text,
    parts_of,
    read_connector,
    save_connector,
)
from hones_steer.errors import DataError
from hones_steer.files import write_atomically

RATES = {"vision_tower": 3e-4, "multi_modal_projector": 1e-3}
WARM_UP = 100
SCENES = 32000
REPORT_EVERY = 20
DEV = 32
"""Scenes of the dev split that are looked at on the way."""


@dataclass(frozen=True)
class Settings:
    """All that decides the result, besides the language model and the number of threads."""

    steps: int
    batch: int
    seed: int
    dtype: str
    """The type in which the language model computes; tower and projector are in float32."""
    any_order: float = 0.0
    """The share of descriptions that have the places in any order."""
    begin: str = ""
    """The sha256 of the file that tower and projector begin with; empty: the embedded model's tower."""


class Batch:
    """Descriptions of pictures, one each, as tokens [n, T] padded on the right, and the pictures' pixels."""

    def __init__(
        self,
        processor: Any,
        pictures: Sequence[Scene],
        drawn: Sequence[Scene],
        rng: random.Random,
        any_order: float = 0.0,
    ) -> None:
        tokenizer, tokens_of_image = processor.tokenizer, IMAGE * _image_tokens(processor)
        rows, starts = [], []
        for scene in drawn:
            prompt, answer = draw(scene, rng, any_order)
            asked = render(processor, prompt, has_image=True).replace(IMAGE, tokens_of_image)
            before = tokenizer.encode(asked, add_special_tokens=False)
            starts.append(len(before))
            rows.append(before + tokenizer.encode(f"{answer}{END}", add_special_tokens=False))
        self.tokens = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
        self.is_answer = torch.zeros(self.tokens.shape, dtype=torch.bool)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            self.tokens[i, : len(row)] = torch.tensor(row)
            self.is_answer[i, start : len(row)] = True
        images = [scene.image() for scene in pictures]
        self.pixels: Tensor = processor.image_processor(images, return_tensors="pt")["pixel_values"]

    def loss(self, model: Any) -> Tensor:
        """The mean cross-entropy of the descriptions' tokens, their end included."""
        # What stands before the image is the same in every row and needs no gradient: one row of it is enough.
        start = (self.tokens[0] == model.config.image_token_id).tolist().index(True)
        with torch.no_grad():
            cache = model.model.language_model(self.tokens[:1, :start], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(self.tokens))
        tokens, is_answer = self.tokens[:, start:], self.is_answer[:, start:]
        # Padding is on the right and attention is causal, so no mask is needed.
        hidden = model.model(input_ids=tokens, pixel_values=self.pixels, past_key_values=cache).last_hidden_state
        predicted = is_answer[:, 1:]
        logits = model.lm_head(hidden[:, :-1][predicted]).float()  # [answer tokens, vocabulary]
        return nn.functional.cross_entropy(logits, tokens[:, 1:][predicted])


def _image_tokens(processor: Any) -> int:
    side: int = processor.image_processor.crop_size["height"]
    return (side // int(processor.patch_size)) ** 2


class Training:
    """Tower and projector, their optimizer and the number of steps done; all of it can be kept in a run folder.

    Raises:
        DataError: the folder holds a training with other settings or another language model, or a damaged one.
    """

    def __init__(self, model: Any, processor: Any, settings: Settings, identity: Mapping[str, str], run: Path) -> None:
        self.model, self.processor, self.settings = model, processor, settings
        self.identity = dict(identity)
        self.about = {**asdict(settings), **identity}
        self.file = run / STATE
        model.requires_grad_(False)
        groups: list[dict[str, Any]] = []
        for name, part in parts_of(model).items():
            part.requires_grad_(True)
            groups.append({"params": [*part.parameters()], "base": RATES[name]})
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        self.examples = scenes("train", SCENES, settings.seed)
        self.done = 0
        if self.file.is_file():
            self._restore()

    def step(self) -> float:
        """Train one step; its loss."""
        self.done += 1
        rng = random.Random(f"smolvlm/{self.settings.seed}/{self.done}")
        drawn = rng.choices(self.examples, k=self.settings.batch)
        loss = Batch(self.processor, drawn, drawn, rng, self.settings.any_order).loss(self.model)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate(self.done, self.settings.steps)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def dev(self) -> tuple[float, float]:
        """The loss on dev scenes, described as they are and as another one is."""
        shown = scenes("dev", DEV, self.settings.seed)
        others = [*shown[1:], shown[0]]
        own, another = (Batch(self.processor, shown, drawn, random.Random(0)) for drawn in (shown, others))
        return own.loss(self.model).item(), another.loss(self.model).item()

    def keep(self) -> None:
        """Write the state, so that a run that is stopped goes on from here."""
        parts = {name: part.state_dict() for name, part in parts_of(self.model).items()}
        file = io.BytesIO()
        state = {"about": self.about, "step": self.done, "parts": parts, "optimizer": self.optimizer.state_dict()}
        torch.save(state, file)
        write_atomically(self.file, file.getvalue())

    def _restore(self) -> None:
        try:
            state = torch.load(self.file, weights_only=True)
            about, done = state["about"], state["step"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise DataError(f"{self.file} cannot be read; delete it to train from the start") from error
        if changed := [name for name, value in self.about.items() if about.get(name) != value]:
            name = changed[0]
            raise DataError(
                f"{self.file.parent} holds a training with {name} {about.get(name)}, not {self.about[name]}; "
                "choose another folder for --run, or the same settings"
            )
        for name, part in parts_of(self.model).items():
            part.load_state_dict(state["parts"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = done


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, from 1, as a share of the highest: a warm-up, then cosine to 5%."""
    if step <= WARM_UP:
        return step / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def prepare_training(text_folder: Path, settings: Settings, run: Path, begin: Path | None = None) -> Training:
    """Put tower and projector before the language model: those that `run` has, else those of `begin`.

    Without `begin` the tower is the embedded model's and the projector is new. With it, `settings.begin` is replaced.

    Raises:
        DataError: as `assemble`, `load_text` and `Training`.
    """
    torch.manual_seed(settings.seed)
    if begin is None:
        text, tokenizer = load_text(text_folder)
        identity = identity_of(text, tokenizer)
        embedded, _ = load_tiny_vlm()
        model, processor = build(text, tokenizer, embedded.config.vision_config)
        model.model.vision_tower.load_state_dict(embedded.model.vision_tower.state_dict())
    else:
        model, processor = assemble(text_folder, begin)
        about, _ = read_connector(begin)
        identity = {name: about[name] for name in ("language_model", "tokenizer")}
        settings = replace(settings, begin=hashlib.sha256(begin.read_bytes()).hexdigest())
    model.set_attn_implementation("eager")  # at 100 tokens in bfloat16, a third faster than fused kernels on a CPU
    for part in (model.model.language_model, model.lm_head):
        part.to(getattr(torch, settings.dtype))
    return Training(model, processor, settings, identity, run)


def train(training: Training, minutes: float, keep_every: int, report: Any) -> bool:
    """Train for so many minutes at most; whether all steps are done. What was done is kept."""
    started, first, steps = time.monotonic(), training.done, training.settings.steps
    recent: list[float] = []
    while training.done < steps and time.monotonic() - started < 60 * minutes:
        recent.append(training.step())
        done = training.done
        if done % REPORT_EVERY == 0 or done == steps:
            each = (time.monotonic() - started) / (done - first)
            mean, recent = sum(recent) / len(recent), []
            left = each * (steps - done) / 60
            report(f"step {done}/{steps} loss {mean:.4f}, {each:.2f} s a step, {left:.0f} min left")
        if done % keep_every == 0:
            training.keep()
            own, another = training.dev()
            report(f"step {done}/{steps} dev loss {own:.4f}, of another's description {another:.4f}")
    training.keep()
    return training.done == steps


def main() -> None:
    """Train a piece; log to stderr; leave the file of tower and projector in --output when all is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="DIR", help="what examples.smollm2.get_model wrote")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of the state, to go on from")
    parser.add_argument("--output", type=Path, default=CONNECTOR, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=55, metavar="M", help="stop after this time (%(default)s)")
    parser.add_argument("--steps", type=int, default=6000, metavar="N", help="of the whole training (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="pictures of a step (%(default)s)")
    parser.add_argument("--keep-every", type=int, default=100, metavar="N", help="steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--any-order",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the descriptions that have the places in any order (%(default)s)",
    )
    parser.add_argument("--begin", type=Path, metavar="FILE", help="what an earlier training wrote, to begin with")
    args = parser.parse_args()
    if not 0 <= args.any_order <= 1:
        parser.error(f"--any-order must lie between 0 and 1, not {args.any_order}")
    for name in ("steps", "batch", "keep_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    keep_freed_memory()
    settings = Settings(args.steps, args.batch, args.seed, args.dtype, args.any_order)
    try:
        training = prepare_training(args.text, settings, args.run, args.begin)
    except DataError as error:
        parser.error(str(error))
    if training.done:
        _log(f"goes on after step {training.done}")
    if train(training, args.minutes, args.keep_every, _log):
        save_connector(training.model, training.identity, args.output)
        _log(f"finished: {args.output}")
    else:
        _log(f"stopped after step {training.done} of {args.steps}; run it again to go on")


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
