"""Shared parts of the runtime benchmarks: a random Llama of a given shape, profiles for it, ratios and intervals."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from numpy.random import Generator

    from hones_steer import Profile

V = TypeVar("V")
R = TypeVar("R")

# glibc gives large blocks back to the system or not, depending on what a process did before: without these, one eager
# process is up to a quarter slower than another that runs the same code. Read when a process starts.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}

LEAST_ROUNDS = 6
"""Fewer have no 95% interval of their median."""


@dataclass(frozen=True)
class Shape:
    """A Llama's size; a profile scales `neurons` of each layer's `ffn`."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def neurons(self) -> int:
        """1% of a layer."""
        return max(1, self.ffn // 100)


SMOLLM2_135M = Shape(layers=30, hidden=576, ffn=1536, heads=9, kv_heads=3, vocabulary=49_152)
TINY = Shape(layers=2, hidden=64, ffn=256, heads=2, kv_heads=1, vocabulary=256)


def random_llama(shape: Shape) -> Any:
    """Always the same weights, larger than a new model's: steering must change what is written."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, mean=1, std=0.1)
        elif "layers" in name:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


def random_profile(model: Any, shape: Shape, task: str, random: Generator, neurons: int | None = None) -> Profile:
    """One that scales `neurons` of every layer (1% if None) by 0 to 3."""
    import numpy as np

    from hones_steer import ModelIdentity, Profile

    count, layers = neurons or shape.neurons, {}
    for layer in range(shape.layers):
        chosen = np.sort(random.choice(shape.ffn, count, replace=False)).astype(np.int32)
        layers[layer] = chosen, random.uniform(0, 3, count).astype(np.float32)
    return Profile(task, layers, ModelIdentity.from_model(model))


def write_byte_tokenizer(shape: Shape, folder: Path) -> None:
    """Write a tokenizer of single bytes, with further tokens up to the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [f"<{i}>" for i in range(len(names), shape.vocabulary)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def task_name(i: int) -> str:
    """The name of profile or adapter `i`."""
    return f"task{i}"


def ratios(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Speed relative to the baseline's round of the same repeat: median, smallest and largest."""
    found = [theirs / mine for mine, theirs in zip(seconds, baseline, strict=True)]
    return {"ratio": statistics.median(found), "ratio_min": min(found), "ratio_max": max(found), "n": len(found)}


def in_turn(
    variants: Sequence[V], run: Callable[[V], R], seconds: float, most: float = math.inf, least: int = LEAST_ROUNDS
) -> dict[V, list[R]]:
    """Results of each variant's rounds, one per repeat, in an order that moves on by one with every repeat.

    There are as many repeats as `seconds` are enough for, but `least` at least and `most` at most: how many depends
    on nothing that was measured, or intervals would be narrower than they should be.
    """
    from tqdm import tqdm

    found: dict[V, list[R]] = {variant: [] for variant in variants}
    end, longest, repeat = time.monotonic() + seconds, 0.0, 0
    with tqdm(unit="repeat", disable=None) as bar:
        while repeat < least or (repeat < most and time.monotonic() + longest < end):
            start = time.monotonic()
            for i in range(len(variants)):
                variant = variants[(i + repeat) % len(variants)]
                found[variant].append(run(variant))
            longest, repeat = max(longest, time.monotonic() - start), repeat + 1
            bar.update()
    return found


def median_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median of `LEAST_ROUNDS` values or more as `name`, and its 95% interval as `name`_low and `name`_high.

    The interval is that of the sign test: from the k-th smallest to the k-th largest value, k so large that fewer than
    k of as many coin tosses are heads with a probability of 2.5% at most. It assumes no distribution.
    """
    ordered, n = sorted(values), len(values)
    tails = [math.comb(n, heads) / 2**n for heads in range(n)]
    k = max(k for k in range(1, n // 2 + 1) if sum(tails[:k]) <= 0.025)
    return {name: statistics.median(ordered), f"{name}_low": ordered[k - 1], f"{name}_high": ordered[n - k]}


def positive(text: str) -> int:
    """For argparse."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
