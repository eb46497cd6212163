"""Gains of a profile under each scope, on the dev tasks of SmolLM2-135M.

    python -m examples.smollm2.scopes --model runs/smollm2/model --out runs/smollm2/scopes

Run it from the repository root, after get_model. Each task's profile is learned on its discovery facts, with the
default selection and settings; then transformers' `generate` answers the test facts untouched, and with all tokens
steered, the prompt's only, or the answer's only. Killed, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hones_offline import Example, Task, attribute, fit
from hones_offline.data.examples import load_jsonl
from hones_offline.data.tasks import JsonlTask
from hones_offline.running.models import load_model

from examples.smollm2.make_data import DEV_TASKS
from examples.smollm2.run import DATA, MAX_NEW_TOKENS
from hones_steer import Profile, steer
from hones_steer.scopes import SCOPES

DRAWS = 2000


def main() -> None:
    """Learn, answer and print a table of gains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="what examples.smollm2.get_model wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the runs, to go on from")
    parser.add_argument("--tasks", nargs="+", choices=DEV_TASKS, default=list(DEV_TASKS), help="default: the dev tasks")
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help="of learning (%(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="facts of each split, drawn at random (default: all)")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    print(f"| task | n | untouched | {' | '.join(SCOPES)} |\n|{'---|' * (3 + len(SCOPES))}", flush=True)
    gains = []
    for name in args.tasks:
        task = JsonlTask(name, "exact_match", MAX_NEW_TOKENS)
        discovery, test = (facts(name, split, args.limit) for split in ("discovery", "test"))
        found = attribute(model, tokenizer, task, discovery, run_dir=args.out / name / "attribution", progress=True)
        factors: dict[str, Any] = {"run_dir": args.out / name / "factors", "epochs": args.epochs, "batch_size": 4}
        profile = fit(model, tokenizer, task, discovery, found.bank, accumulation_steps=1, progress=True, **factors)
        right = {scope: answers(model, tokenizer, task, test, profile, scope) for scope in (None, *SCOPES)}
        gains.append(np.stack([right[scope] - right[None] for scope in SCOPES]))
        print(f"| {name} | {len(test)} | {right[None].mean():.2f} | {cells(gains[-1:])} |", flush=True)
    print(f"| mean | {sum(gain.shape[1] for gain in gains)} | | {cells(gains)} |")


def facts(name: str, split: str, limit: int | None) -> list[Example]:
    """The facts of a split, in random order."""
    examples = load_jsonl(DATA / split / f"{name}.jsonl").examples
    return [examples[i] for i in np.random.default_rng(0).permutation(len(examples))[:limit]]


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, task: Task, examples: Sequence[Example], profile: Profile, scope: str | None
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Whether each fact is answered right [n], steered in a scope or, for None, not at all."""
    outputs: list[str] = []
    with steer(model, {task.name: profile}) as steering:
        for start in range(0, len(examples), 32):
            prompts = [task.prompt(example) for example in examples[start : start + 32]]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
            with steering.task(task.name if scope else None, scope=scope or "all"):
                tokens = model.generate(**inputs, do_sample=False, max_new_tokens=task.max_new_tokens)
            new = tokens[:, inputs["input_ids"].shape[1] :]
            outputs += [task.clean(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return np.array([task.score(example, output) for example, output in zip(examples, outputs, strict=True)])


def cells(gains: Sequence[np.ndarray[Any, np.dtype[np.float64]]]) -> str:
    """Mean gains of each scope over tasks, from [scopes, n] of each, with 95% bootstrap intervals over facts."""
    rng = np.random.default_rng(0)
    draws = np.mean(
        [gain[:, rng.integers(gain.shape[1], size=(DRAWS, gain.shape[1]))].mean(axis=2) for gain in gains], axis=0
    )
    means = np.mean([gain.mean(axis=1) for gain in gains], axis=0)
    bounds = np.quantile(draws, (0.025, 0.975), axis=1)
    return " | ".join(f"{mean:+.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in zip(means, *bounds, strict=True))


if __name__ == "__main__":
    main()
