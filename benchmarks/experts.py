"""Tokens per second of a mixture of experts with hones-steer, as ratios to the same model without it.

    .venv/bin/python benchmarks/experts.py

(a few minutes on one core) compares, under each experts implementation of transformers, prefill and decode of a batch
of eight rows, eager:

    unsteered       transformers as it comes
    again           the same once more: how far from 1 a ratio gets by chance
    hooked, idle    steer() is attached and no task is chosen
    hooked, 1 or 8  one task for the whole batch, or another one for each of its eight rows
    folded          steering.fold(): the scales are in the weights, the hooks are still there

The model is a Qwen3-MoE with random weights in float32: 8 layers of 32 experts of 192 neurons, of which a token goes to
4, hidden size 256; a profile scales 1% of each expert's neurons, two. Variants take turns in an order that moves on by
one with every repeat, and a ratio is to the `unsteered` round of the same repeat. The table gives the median over the
repeats and, in brackets, the smallest and the largest. Seconds are CPU time of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from common import ALLOCATOR, in_turn, positive, ratios, task_name

ROWS = 8
VARIANTS = ("unsteered", "again", "hooked, idle", "hooked, 1", "hooked, 8", "folded")
PHASES = ("prefill", "decode")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description="Tokens per second of a mixture of experts unsteered, hooked and folded.",
        epilog="The top of this file says how it is measured. Close everything else: the others' work is noise here.",
    )
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of a table")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one repeat: does it run?")
    parser.add_argument("--repeats", type=positive, default=11, metavar="N", help="rounds per row (default: 11)")
    parser.add_argument("--prompt-tokens", type=positive, default=64, metavar="N", help="of prefill (default: 64)")
    parser.add_argument("--steps", type=positive, default=4, metavar="N", help="of decode, per round (default: 4)")
    args = parser.parse_args(argv)
    if any(os.environ.get(name) != value for name, value in {**ALLOCATOR, "OMP_NUM_THREADS": "1"}.items()):
        os.environ.update(ALLOCATOR, OMP_NUM_THREADS="1")  # which are only read when a process starts
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    rows = list(measure(args))
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return 0


def mixture(*, quick: bool) -> Any:
    """Always the same weights, larger than a new model's: steering must change what is written."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    large = {"hidden_size": 256, "moe_intermediate_size": 192, "num_hidden_layers": 8, "num_experts": 32}
    small = {"hidden_size": 32, "moe_intermediate_size": 48, "num_hidden_layers": 2, "num_experts": 4}
    config = Qwen3MoeConfig(
        **(small if quick else large),
        num_experts_per_tok=2 if quick else 4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8 if quick else 64,
        vocab_size=256,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    for name, weight in model.model.named_parameters():
        if "layers" in name and weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return model


def random_profiles(model: Any) -> dict[str, Any]:
    """`ROWS` profiles that scale two neurons of every expert by 0 to 3."""
    import numpy as np

    from hones_steer import ModelIdentity, Profile

    identity, random = ModelIdentity.from_model(model), np.random.default_rng(0)
    profiles = {}
    for task in map(task_name, range(ROWS)):
        ffns = {
            (layer, expert): (
                np.sort(random.choice(run.expert_width, 2, replace=False)).astype(np.int32),
                random.uniform(0, 3, 2).astype(np.float32),
            )
            for run in identity.runs
            for layer in range(run.first, run.stop)
            for expert in range(run.experts)
        }
        profiles[task] = Profile(task, ffns, identity)
    return profiles


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each implementation, phase and variant."""
    import torch

    from hones_steer.experts import IMPLEMENTATIONS

    torch.set_num_threads(1)
    model = mixture(quick=args.quick)
    profiles = random_profiles(model)
    repeats = 1 if args.quick else args.repeats
    with torch.no_grad():
        for implementation in IMPLEMENTATIONS:
            model.set_experts_implementation(implementation)
            check(model, profiles)
            for phase in PHASES:
                tokens = ROWS * (args.prompt_tokens if phase == "prefill" else args.steps)

                def run(variant: str, phase: str = phase) -> float:
                    with steered(model, profiles, variant) as block:
                        return seconds(model, phase, args, block)

                found = in_turn(VARIANTS, run, seconds=0, most=repeats, least=repeats)
                for variant, times in found.items():
                    yield {
                        "implementation": implementation,
                        "phase": phase,
                        "mode": variant,
                        "tokens_per_s": tokens / sorted(times)[len(times) // 2],
                        **ratios(times, found["unsteered"]),
                    }


@contextmanager
def steered(model: Any, profiles: dict[str, Any], variant: str) -> Iterator[AbstractContextManager[None]]:
    """Within the block the model is ready for a variant; what it gives is to be around its forwards."""
    from hones_steer import steer

    if variant in ("unsteered", "again"):
        yield nullcontext()
        return
    with steer(model, profiles) as steering:
        if variant == "folded":
            steering.fold(task_name(0))
        blocks = {
            "hooked, 1": lambda: steering.task(task_name(0)),
            "hooked, 8": lambda: steering.tasks(list(profiles)),
        }
        yield blocks.get(variant, nullcontext)()


def seconds(model: Any, phase: str, args: argparse.Namespace, block: AbstractContextManager[None]) -> float:
    """CPU time of a prefill, or of some decode steps after one, once the caches are warm."""
    import torch

    prompt = torch.arange(ROWS * args.prompt_tokens).view(ROWS, -1) % 256
    with block:
        out = model(input_ids=prompt, use_cache=True)
        begun = time.process_time()
        if phase == "prefill":
            model(input_ids=prompt, use_cache=True)
        else:
            cache = out.past_key_values
            for step in range(args.steps):
                cache = model(input_ids=prompt[:, step : step + 1], past_key_values=cache).past_key_values
        return time.process_time() - begun


def check(model: Any, profiles: dict[str, Any]) -> None:
    """Fail if the ways to apply a profile disagree, or if it changes nothing."""
    import torch

    inputs = {"input_ids": torch.arange(ROWS * 8).view(ROWS, 8)}
    plain, found = model(**inputs).logits, {}
    for variant in VARIANTS[3:]:
        with steered(model, profiles, variant) as block, block:
            found[variant] = model(**inputs).logits
    torch.testing.assert_close(found["folded"], found["hooked, 1"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found["hooked, 8"][0], found["hooked, 1"][0], atol=1e-3, rtol=1e-3)
    if torch.allclose(found["hooked, 1"], plain, atol=1e-2):
        raise AssertionError("the profile changes nothing")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| Implementation | Phase | Mode | Tokens/s | Ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['implementation']} | {row['phase']} | {row['mode']} | {row['tokens_per_s']:.0f} "
        f"| {row['ratio']:.3f} [{row['ratio_min']:.3f}, {row['ratio_max']:.3f}] |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
