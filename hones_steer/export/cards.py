"""Model cards (README.md) of exports and of profiles on the Hub: Markdown under Hugging Face's YAML header."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from hones_steer.profile import Profile

# A card without this line was written by hand, and is left alone.
GENERATED = "<!-- Written by `hones push`, which replaces it. Delete this line to keep a text of your own. -->"

# The columns that `hones learn`, `fit` and `demo` write come first, in this order.
_EVIDENCE_ORDER = ("metric", "split", "n", "base", "steered", "gain_ci95", "masked", "others", "others_mean")


def card(profiles: Sequence[Profile], paragraphs: Sequence[str], **header: Any) -> str:
    """Text of a card: a YAML header (base model, license, tags of the profiles, and `header`), then the paragraphs."""
    licenses = {profile.license for profile in profiles} - {""}
    data = {
        "base_model": profiles[0].base_model.name or None,
        "license": next(iter(licenses)).lower() if len(licenses) == 1 else None,
        "tags": ["hones-steer"],
        **header,
    }
    text = ModelCardData(ignore_metadata_errors=True, **data).to_yaml(line_break="\n")
    return "\n\n".join([f"---\n{text}\n---", *paragraphs]) + "\n"


def profiles_table(profiles: Sequence[Profile]) -> str:
    """Table of the profiles: task, digest, neurons, description, license."""
    rows = []
    for profile in profiles:
        share = profile.num_neurons / profile.base_model.num_neurons
        rows.append(
            {
                "task": profile.task,
                "digest": f"`{profile.short_digest}`",
                "FFN neurons": f"{profile.num_neurons:,} ({share:.2%})",
                "description": profile.description,
                "license": profile.license,
            }
        )
    return _table(rows)


def evidence_table(profiles: Sequence[Profile]) -> str:
    """Table of what was measured, one row per task; a sentence instead if no profile has evidence."""
    rows = [{"task": profile.task, **profile.evidence} for profile in profiles if profile.evidence]
    if not rows:
        return "No evidence: nothing was measured for what is here."
    return _table(rows, ("task", *_EVIDENCE_ORDER))


def describe_model(profile: Profile) -> str:
    """One line about the profile's base model."""
    model = profile.base_model
    name = f"`{model.name}`" if model.name else "a model without a public name"
    revision = f" at revision `{model.revision}`" if model.revision else ""
    return (
        f"{_cell(name + revision)} ({_cell(model.model_type)}, {model.describe_ffns('×')}, "
        f"hidden size {model.hidden_size:,})"
    )


def hub_card(repo: str, profiles: Sequence[Profile]) -> str:
    """Text of a repository's model card: base model, tasks, evidence, and how to use it."""
    task, model = profiles[0].task, profiles[0].base_model.name or "BASE_MODEL"
    return card(
        profiles,
        [
            GENERATED,
            f"# Steering profiles: {', '.join(profile.task for profile in profiles)}",
            f"Per-task factors for FFN neurons of {describe_model(profiles[0])}, for "
            "hones-steer: the weights stay as they are, and a request chooses its task. The method is HONES ([arXiv 2604.17941](https://arxiv.org/abs/2604.17941)).",
            profiles_table(profiles),
            "## Evidence",
            evidence_table(profiles),
            "## Use",
            "Pin a commit instead of `main` where the answers must stay the same.",
            _hub_usage(repo, model, task),
        ],
        library_name="hones-steer",
    )


def _hub_usage(repo: str, model: str, task: str) -> str:
    return f"""\
Hugging Face:

```python
from hones_steer import pull_profile, steer

steering = steer(model, {{"{task}": pull_profile("{repo}", "{task}", revision="main")}})
with steering.task("{task}"):
    model.generate(**inputs)
```

vLLM:

```sh
hones serve {model} --profiles hub:{repo}@main
```

PEFT:

```sh
hones pull {repo} --task {task} --out .
hones export {task}.safetensors {model} --to peft --out {task}-ia3
```"""


def _table(rows: Sequence[Mapping[str, object]], order: Sequence[str] = ()) -> str:
    present = dict.fromkeys(key for row in rows for key in row)
    columns = [*(key for key in order if key in present), *(key for key in present if key not in order)]
    cells = [[row.get(key, "") for key in columns] for row in rows]
    lines: list[list[object]] = [[*columns], ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    """A value from a profile as one table cell that can neither end its row nor smuggle in HTML."""
    text = _text(value)
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _text(value: object) -> str:
    """A value in one line, numbers with four digits: an interval as [0.1, 0.2], an object as its keys and values."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        parts = (f"{key}: ({_text(x)})" if isinstance(x, Mapping) else f"{key}: {_text(x)}" for key, x in value.items())
        return ", ".join(parts)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
