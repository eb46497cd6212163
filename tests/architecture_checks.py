"""Checks of one model for the table of architectures, a function for each column; they make a cell.

A cell is "yes", with what should be known beside it, or "no" with the reason: the message of hones-steer's own error,
or what transformers says of its model. Everything is compared with the slow twins in `reference.py`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import reference
import tiny_models
import torch
from hones_offline.attribution.heads import head_scores, head_statistics, top_heads
from hones_offline.attribution.write_in import head_guided_importance, require_write_in, target_directions
from hones_offline.data.examples import Example, MemoryImage
from hones_offline.data.tasks import JsonlTask
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import prepare
from PIL import Image
from reference_steering import experts_forward
from stand_in_processors import plain_tokenizer, processor_for
from tiny_architectures import OTHER_TOWER
from torch import Tensor
from torch._dynamo.utils import counters

from hones_steer import steer
from hones_steer.errors import HonesError
from hones_steer.ffns import Ffn
from hones_steer.layout import find_layout
from hones_steer.profile import ModelIdentity, Profile
from serving import checkpoints

TASKS = ("a", None, "b", None)


@dataclass(frozen=True)
class Cell:
    """`yes` is None where the column does not apply; `said` is the reason of a no, or what to know of a yes."""

    yes: bool | None
    said: str = ""


class WrongError(Exception):
    """Raised where what was computed is not what the twin computes."""


class NotRunError(Exception):
    """Raised where transformers does not run the model on what it is given here."""


def judged(check: Callable[[], str]) -> Cell:
    """The cell of a check that returns what to know of its yes."""
    try:
        return Cell(True, check())
    except HonesError as error:
        return Cell(False, str(error))
    except WrongError as error:
        return Cell(False, f"WRONG: {error}")
    except (NotRunError, LookupError) as error:
        return Cell(False, str(error))
    except Exception as error:  # noqa: BLE001 - a row must not end the table
        return Cell(False, f"{type(error).__name__}: {error}")


# Steering


def profiles_of(model: Any) -> dict[str, Profile]:
    """Two profiles that scale a third of the neurons of each FFN by factors from -2 to 3."""
    identity = ModelIdentity.from_model(model)
    result = {}
    for seed, task in enumerate("ab"):
        generator = np.random.default_rng(seed)
        layers = {}
        for ffn, width in ffns_of(model):
            chosen = np.flatnonzero(generator.random(width) < 0.3).astype(np.int32)
            layers[ffn] = (chosen, generator.uniform(-2, 3, len(chosen)).astype(np.float32))
        result[task] = Profile(task=task, layers=layers, base_model=identity)
    return result


def ffns_of(model: Any) -> Iterator[tuple[Ffn, int]]:
    """The FFNs of a model in order, each expert by itself, and their widths."""
    for layer in find_layout(model).layers:
        yield from ((projection.ffn, projection.width) for projection in layer.projections)
        if layer.experts is not None:
            yield from ((Ffn(layer.index, expert), layer.experts.width) for expert in range(layer.experts.count))


@contextmanager
def scaled_plainly(model: Any, profile: Profile) -> Iterator[None]:
    """Within the block, the model does what the profile says, by the slow twins."""
    layout = find_layout(model)
    with ExitStack() as stack:
        for projection in layout.projections:
            if projection.ffn in profile.ffns:
                stack.enter_context(reference.input_scaled(projection.down_proj, *profile.ffns[projection.ffn]))
        for layer, experts in layout.experts.items():
            listed = {ffn.part: pair for ffn, pair in profile.ffns.items() if ffn.layer == layer}
            factors = {
                part: dict(zip(neurons.tolist(), scales.tolist(), strict=True))
                for part, (neurons, scales) in listed.items()
                if isinstance(part, int)
            }
            experts.module.forward = experts_forward(experts.module, factors)
            stack.callback(delattr, experts.module, "forward")
        yield


def inputs_for(model: Any) -> tuple[dict[str, Tensor], str]:
    """Four rows that the model runs on, of padded text or if it refuses that with an image each; and what they are."""
    text = tiny_models.text_inputs()
    if model.config.is_encoder_decoder:
        text["decoder_input_ids"] = text["input_ids"]
    try:
        logits(model, text)
    except (TypeError, ValueError, AttributeError, RuntimeError) as refusal:
        try:
            processor, _ = processor_for(model)
        except LookupError as error:
            raise NotRunError(f"transformers does not run it on text: {refusal}, and {error}") from error
        rows = [
            dict(processor(images=[picture(i)], text=[f"{processor.image_token} what is {word}"], return_tensors="pt"))
            for i, word in enumerate(("cat", "dog", "big", "town"))
        ]
        batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = batch["input_ids"]
        return batch, "with an image"
    return text, ""


def picture(number: int) -> Image.Image:
    """A random picture, always the same for its number; all of one size."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (24, 24, 3), dtype=np.uint8))


def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """A forward without a cache."""
    with torch.no_grad():
        result: Tensor = model(**inputs, use_cache=False).logits
    return result


def far(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by more than rounding; logits that a model sets to the least number do not count."""
    some = expected.abs() < 1e30
    return not float((found - expected)[some].abs().max()) <= 1e-3 * float(expected[some].abs().max())


def check_steering(model: Any) -> str:
    """Rows of a mixed batch equal rows alone under plain hooks; unsteered rows and the detached model are untouched."""
    if any(experts.by_interface for experts in find_layout(model).experts.values()):
        model.set_experts_implementation(
            "batched_mm"
        )  # each token by itself, so that rows do not depend on one another
    inputs, what = inputs_for(model)
    real = inputs["attention_mask"].bool()
    if model.config.is_encoder_decoder:
        real = torch.ones_like(inputs["decoder_input_ids"]).bool()
    plain = logits(model, inputs)
    if not bool(plain[real].isfinite().all()):
        raise NotRunError("random weights give no finite logits")
    profiles = profiles_of(model)
    with steer(model, profiles) as steering:
        verified = steering.verify(**{name: value[:2] for name, value in inputs.items()} if what else {})
        with steering.tasks(TASKS):
            mixed = logits(model, inputs)
    rows = [tiny_models.select_row(inputs, row) for row in range(len(TASKS))]
    batch_is_rows = not any(far(logits(model, rows[i])[0, real[i]], plain[i, real[i]]) for i in range(len(TASKS)))
    for i, task in enumerate(TASKS):
        if task is None:
            if not torch.equal(mixed[i], plain[i]):
                raise WrongError(f"unsteered row {i} of a mixed batch is not bit-equal to the untouched model")
            continue
        with scaled_plainly(model, profiles[task]):
            alone = logits(model, rows[i])[0] if batch_is_rows else logits(model, inputs)[i]
        if far(mixed[i, real[i]], alone[real[i]]):
            raise WrongError(f"steered row {i} of a mixed batch differs from the row alone under plain hooks")
        if not far(mixed[i, real[i]], plain[i, real[i]]):
            raise WrongError(f"steering row {i} changes nothing")
    if not torch.equal(logits(model, inputs), plain):
        raise WrongError("after detach the model is not what it was")
    notes = [what] if what else []
    if not batch_is_rows:
        notes.append("its own batches differ from rows alone")
    if verified.layers_not_run:
        notes.append(f"text does not reach {len(verified.layers_not_run)} of its layers")
    if missing := find_layout(model).num_without_ffn:
        notes.append(f"{missing} of {len(find_layout(model).layers)} layers have no FFN")
    return "; ".join(notes)


def check_compiling(model: Any) -> str:
    """torch.compile of the steered model equals the steered model run eagerly."""
    find_layout(model)
    inputs, what = inputs_for(model)
    inputs.pop("attention_mask") if not what and not model.config.is_encoder_decoder else None
    counters.clear()
    with steer(model, profiles_of(model)) as steering:
        with steering.tasks(TASKS):
            expected = logits(model, inputs)
        compiled = torch.compile(model, backend="eager")
        for tasks in (TASKS, TASKS[::-1]):
            with steering.tasks(tasks), torch.compiler.set_stance("force_eager"):
                expected = logits(model, inputs)
            with steering.tasks(tasks):
                found = logits(compiled, inputs)
            if far(found, expected):
                if far(logits(compiled, inputs), logits(model, inputs)):
                    raise NotRunError("compiled by torch, it differs from itself run eagerly, unsteered too")
                raise WrongError("the compiled model differs from the steered model run eagerly")
    notes = [what] if what else []
    if counters["graph_break"]:
        notes.append("in several graphs")
    return "; ".join(notes)


# Attribution


QUESTIONS = ("what is cat", "what is a big dog", "what is", "what is small town on mat cat")
ANSWERS = ("red cat sits", "a blue dog on mat")


def examples_of(*, image: bool) -> list[Example]:
    """Prompts of different lengths, whose batch is padded; pictures differ in size."""
    rng = np.random.default_rng(0)
    result = []
    for i, question in enumerate(QUESTIONS):
        pixels = rng.integers(0, 255, (16 + 8 * i, 24, 3), dtype=np.uint8)
        own = MemoryImage(Image.fromarray(pixels), f"random-{i}") if image else None
        result.append(Example(str(i), question, ANSWERS, own))
    return result


def check_attribution(model: Any, processor: Any, *, image: bool) -> str:
    """Head scores and importance equal the reference, in batches of nine and of one."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    task, examples = JsonlTask("text", "bleu4", max_new_tokens=4), examples_of(image=image)
    prepared = prepare(model, processor, task, examples)
    require_write_in(prepared, Execution())
    found = {}
    for size in (9, 1):
        run = Execution(batch_size=size, memory_gb=4 if size > 1 else 1e-9)
        scores = head_scores(prepared, "logprob", *head_statistics(prepared, "logprob", run)).by_head
        if not found:
            weights = guiding(scores)
        heads = top_heads(weights, 2)
        found[size] = scores, np.asarray(head_guided_importance(prepared, target_directions(prepared), heads, run))
    expected = np.array(reference.head_scores(model, processor, task, examples, reference.mean_log_probability))
    own = reference.importance(model, processor, task, examples, weights, top_heads=2).numpy()
    if not own.max() > 0:
        raise WrongError("no neuron has an importance")
    for size, (scores, importance) in found.items():
        if not np.array_equal(np.isnan(scores), np.isnan(expected)):
            raise WrongError("layers without heads are not those of the reference")
        if not np.nanmax(np.abs(scores - expected)) <= 1e-4:
            raise WrongError(f"head scores in batches of {size} differ from the reference")
        if not np.abs(importance - own).max() <= 1e-3 * own.max():
            raise WrongError(f"importance in batches of {size} differs from the reference")
    without = int(np.isnan(expected).all(1).sum())
    return f"{without} of {len(expected)} layers have no heads" if without else ""


def guiding(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Scores that guide to some neuron: all above 0, and none in the last layer, beside which an FFN may run."""
    weights = scores - np.nanmin(scores) + 0.1
    with_heads = np.flatnonzero(~np.isnan(scores).all(1))
    weights[with_heads[1:][-1:]] = np.nan
    return weights


def check_text(model: Any) -> str:
    """Attribution on text, after the reference has shown that transformers runs the model on it."""
    return check_attribution(model, plain_tokenizer(model.config, {}), image=False)


def check_image(model: Any) -> str:
    """Attribution with images, by a real processor or a stand-in."""
    if (layout := find_layout(model)).experts:
        layout.require_attribution()
    if model.config.model_type in OTHER_TOWER:
        raise NotRunError("its vision tower needs the timm package")
    processor, real = processor_for(model)
    said = check_attribution(model, processor, image=True)
    return "; ".join(filter(None, ["" if real else "stand-in", said]))


# vLLM

# Model types that the plugin's tests run in vLLM engines (tests/serving/engine).
IN_VLLM = {
    *("llama", "llava"),
    *checkpoints.UNGATED,
    *checkpoints.GATED,
    *checkpoints.VLMS,
    *checkpoints.MIXTURES,
}


def vllm_cell(row: Any, model: Any | None) -> Cell:
    """Whether the plugin's tests run this architecture in vLLM; nothing is run here."""
    if row.model_type in IN_VLLM and not row.note:
        return Cell(True)
    if model is not None:
        try:
            find_layout(model)
        except HonesError as error:
            return Cell(False, str(error))
    return Cell(None, "not tried")


COLUMNS: dict[str, Callable[[Any], str]] = {
    "steer": check_steering,
    "text": check_text,
    "image": check_image,
    "compile": check_compiling,
}


def shortened(message: str, length: int = 150) -> str:
    """A reason on one line, without its remedy and without what differs between models of one kind."""
    line = " ".join(message.split())
    line = re.sub(r"^\S+ \(\w+\) of model type '\S+': ", "", line)
    line = re.sub(r"^\S+: (?=its )| (of|in) model type '[^']*'|^model type '[^']*' (is (?=not))?", "", line)
    line = re.sub(r" \(by [^)]*\), as where .*", "", line)
    line = re.sub(r" \(input_ids [^)]*\)", "", line)
    line = re.split(r"; (?!and )", line)[0]
    return line if len(line) <= length else line[: length - 1] + "…"
