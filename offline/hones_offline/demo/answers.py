"""The model's answers themselves: before and after, and four tasks in one batch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hones_offline.data.scenes import scenes
from hones_offline.data.tasks import TASKS
from hones_offline.demo.data_set import SCENE_TASKS, SceneExample, in_words
from hones_offline.demo.settings import BATCH
from hones_offline.running.evaluation import intervention, score
from hones_offline.running.prompts import prepare, render, tokenizer_of
from hones_steer.huggingface import steer
from hones_steer.profile import Profile

_LOOKED_AT = 24
"""Test scenes among which one is looked for whose answer the profile changes."""


def before_and_after(
    model: Any,
    processor: Any,
    examples: Mapping[str, Sequence[SceneExample]],
    words: Mapping[str, str],
    profiles: Mapping[str, Profile],
) -> list[str]:
    """Lines on three answers: of each task that generates, the first test scene whose answer its profile changes."""
    lines = ["", "Three answers, each to the first test scene whose answer the profile changes:", ""]
    for name in (name for name, task in SCENE_TASKS.items() if task.kind == "generate"):
        some = examples[name][:_LOOKED_AT]
        plain, steered, asked = (
            _said(model, processor, task, some, profile)
            for task, profile in (
                (SCENE_TASKS[name], None),
                (SCENE_TASKS[name], profiles[name]),
                (in_words(name, words[name]), None),
            )
        )
        changed = [i for i in range(len(some)) if plain[i] != steered[i]]
        if not changed:
            lines.append(f"  {name}: the profile changes none of {len(some)} answers")
            continue
        i = changed[0]
        question = f" {some[i].prompt}" if some[i].prompt else ""
        lines += [f"  {name}:{question}", f"    wanted   {some[i].targets[0]}", f"    plain    {plain[i]}"]
        lines += [f"    asked    {asked[i]}", f"    steered  {steered[i]}"]
    return lines


def _said(
    model: Any, processor: Any, task: Any, examples: Sequence[SceneExample], profile: Profile | None
) -> Sequence[Any]:
    prepared = prepare(model, processor, task, examples)
    with intervention(prepared, steering=profile):
        return score(prepared, batch_size=BATCH).outputs


def mixed_batch(model: Any, processor: Any, profiles: Path) -> list[str]:
    """Lines on four images, four tasks, one batch: each row steered by its own profile, beside the same row alone."""
    tokenizer = tokenizer_of(processor)
    shown = scenes("test", len(TASKS))
    prompts = [scene.prompt(name, scene.candidates(1)[0]) for name, scene in zip(TASKS, shown, strict=True)]
    texts = [render(processor, prompt, has_image=True) for prompt in prompts]
    images = [scene.image() for scene in shown]

    def generate(rows: Sequence[int]) -> list[str]:
        inputs = processor(
            images=[images[i] for i in rows],
            text=[texts[i] for i in rows],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=48)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        decoded: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in decoded]

    everyone = range(len(TASKS))
    with steer(model, {name: profiles / f"{name}.safetensors" for name in TASKS}) as steering:
        plain = generate(everyone)
        with steering.tasks(list(TASKS)):
            mixed = generate(everyone)
        alone = []
        for i, name in enumerate(TASKS):
            with steering.task(name):
                alone += generate([i])
    lines = ["", "One batch, four images, four tasks, each row steered by its own profile:", ""]
    for i, name in enumerate(TASKS):
        same = "same as alone" if mixed[i] == alone[i] else f"ALONE IT IS: {alone[i]}"
        lines.append(f"  {name:10} {mixed[i]}   ({same}; unsteered: {plain[i]})")
    return lines
