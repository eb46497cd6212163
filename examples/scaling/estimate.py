"""Costs of `hones attribute` on a large model: layer-forwards, operations, bytes, hours. Computed, not measured.

    python -m examples.scaling.estimate --examples 1000 --gpus 1 8 64

Counted is what the program does, with the division of work that it really makes
(`hones_offline.running.distributed`); assumed
are the options below. A layer-forward is one decoder layer run on one example's tokens.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hones_offline.attribution.methods import AttributionOptions
from hones_offline.running.distributed import Processes

BF16 = 2  # bytes
BACKWARD = 2  # forwards that a backward pass takes at most; the weights are frozen, so their products take one


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that decide the cost."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    ffn: int
    weights: float
    top_heads: int
    image_tokens: int
    vision_flops: float
    """Operations of one image through the vision tower."""

    @property
    def layer_parameters(self) -> int:
        """Attention and FFN of one layer."""
        kv = self.hidden * self.kv_heads // self.heads
        return 2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.ffn

    @property
    def left_out(self) -> float:
        """Share of a layer-forward that a head's run leaves out: queries, keys, values of its layer, the last FFN."""
        return 1 - self.hidden**2 / self.layer_parameters

    def layer_flops(self, tokens: int) -> float:
        """One layer-forward: two per weight and token, and attention over the tokens before each."""
        return 2.0 * self.layer_parameters * tokens + 2.0 * self.hidden * tokens**2

    def kv_bytes(self, tokens: int) -> float:
        """Keys and values of all layers."""
        return 2.0 * BF16 * self.layers * tokens * self.hidden * self.kv_heads / self.heads


def llava() -> Shape:
    """LLaVA-1.5-7B: one image is 576 tokens, 577 patches through 0.3 billion weights."""
    return Shape("LLaVA-1.5-7B", 32, 32, 32, 4096, 11008, 7.06e9, 30, 576, 2 * 0.30e9 * 577)


def qwen(image_tokens: int) -> Shape:
    """Qwen2.5-VL-7B: tokens depend on the image's size, each made of four patches through 0.68 billion weights."""
    return Shape("Qwen2.5-VL-7B", 28, 28, 4, 3584, 18944, 8.29e9, 25, image_tokens, 2 * 0.68e9 * 4 * image_tokens)


MODELS = (llava(), qwen(300), qwen(1300))


@dataclass(frozen=True)
class Run:
    """One attribution."""

    shape: Shape
    args: argparse.Namespace

    @property
    def prompt(self) -> int:
        """Tokens of a prompt."""
        return self.shape.image_tokens + int(self.args.text_tokens)

    @property
    def tokens(self) -> int:
        """Tokens of a prompt with its answer."""
        return self.prompt + int(self.args.answer_tokens)

    def layer_forwards(self) -> tuple[float, float]:
        """Layer-forwards of all examples: for head scores, for importance (heads spread evenly over the layers)."""
        depth, per_head = self.shape.layers, self.layers_of_a_head()
        scoring = depth + self.args.evaluated * self.shape.heads * depth * per_head
        importance = depth + self.shape.top_heads * per_head
        return self.args.examples * scoring, self.args.examples * importance

    def by_way(self) -> dict[str, float]:
        """Layer-forwards of all examples by each way: HONES by log-probability, and a method that runs backward.

        With preselected heads these are spread evenly over the layers.
        """
        depth, heads = self.shape.layers, self.shape.top_heads
        scoring, importance = self.layer_forwards()
        both_passes = depth * (1 + BACKWARD)
        run = min(math.ceil(heads * (1 + self.args.margin)), depth * self.shape.heads)
        preselected = 2 * both_passes + depth + run * self.layers_of_a_head()
        gradients = depth + both_passes  # the untouched model's utility comes first
        return {
            "hones": scoring + importance,
            "--heads patch": self.args.examples * preselected + importance,
            "grad_all, fisher": self.args.examples * gradients,
        }

    def layers_of_a_head(self) -> float:
        """Layer-forwards of one head on one example, on average."""
        return (self.shape.layers + 1) / 2 - self.shape.left_out

    def hours(self, gpus: int, head_metric: str) -> float:
        """Hours of the process that has most to do; every process encodes every image."""
        depth, args = self.shape.layers, self.args
        batches = math.ceil(args.examples / args.batch_size)
        parts = Processes(0, gpus).parts(batches, depth)
        units = [0.0] * gpus  # layer-forwards, the undisturbed ones of each part included
        drafts = [0] * gpus
        for number in range(batches):
            rows = min(args.batch_size, args.examples - number * args.batch_size)
            for part in range(parts):
                owner = (number * parts + part) % gpus
                layers = [depth - layer - self.shape.left_out for layer in range(part, depth, parts)]
                of_heads = args.evaluated * self.shape.heads * sum(layers)
                units[owner] += rows * (depth + of_heads)
                drafts[owner] += 1
        rate = args.tflops * 1e12 * args.utilisation
        scoring = max(units) * self.shape.layer_flops(self.tokens) / rate
        rows = min(args.examples, args.batch_size * math.ceil(batches / gpus))
        importance = rows * (depth + self.shape.top_heads * self.layers_of_a_head())
        importance *= self.shape.layer_flops(self.prompt) / rate
        encoding = args.examples * self.shape.vision_flops / rate
        decoding = self.decoding(max(units), max(drafts)) if head_metric == "task" else 0.0
        return float((scoring + importance + encoding + decoding) / 3600)

    def decoding(self, layer_forwards: float, drafts: int) -> float:
        """Seconds of text generation: every step reads the weights and the rows' keys and values once."""
        args = self.args
        step = (self.shape.weights * BF16 + args.batch_size * self.shape.kv_bytes(self.tokens)) / (
            args.bandwidth * 1e12
        )
        heads = layer_forwards / args.batch_size / self.layers_of_a_head()  # pairs of a head and a batch
        prefill = drafts * args.batch_size * self.shape.layers * self.shape.layer_flops(self.prompt)
        steps = (drafts + args.parted * heads / 2) * args.answer_tokens  # rows part half-way, on average
        return float(steps * step + prefill / (args.tflops * 1e12 * args.utilisation))

    def gib(self) -> dict[str, float]:
        """GiB on each GPU, and in each process's main memory."""
        rows, depth = self.args.batch_size, self.shape.layers
        states = rows * self.tokens * 2 * self.shape.hidden * BF16 * depth  # with the heads' outputs, as wide here
        encoded = self.args.examples * self.prompt * self.shape.hidden * BF16
        found = {
            "weights": self.shape.weights * BF16,
            "states": states,
            "kv": 3 * rows * self.shape.kv_bytes(self.tokens),
            "encoded": encoded,
        }
        return {name: size / 2**30 for name, size in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="discovery examples (default: %(default)s)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], help="(default: 1 8 64)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--text-tokens", type=int, default=44, help="of a prompt (default: %(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--tflops", type=float, default=312, help="peak of one GPU: A100, bf16 (default: %(default)s)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="of the peak (default: %(default)s)")
    parser.add_argument("--bandwidth", type=float, default=2.0, help="memory's, TB/s (default: %(default)s)")
    parser.add_argument(
        "--parted", type=float, default=0.2, help="share of answers that a replaced head changes (default: %(default)s)"
    )
    parser.add_argument(
        "--evaluated",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of heads on examples: below 1 where heads race (default: %(default)s)",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=AttributionOptions().margin,
        metavar="SHARE",
        help="with preselected heads: those run beyond the number wanted, as a share of it (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    print(f"{'':24}{'layer-forwards':>22}{'':>9}   hours: logprob (task) on GPUs")
    columns = "".join(f"{gpus:>18}" for gpus in args.gpus)
    print(f"{'':24}{'scores':>11}{'importance':>11}{'PFLOP':>9}{columns}")
    runs = [Run(shape, args) for shape in MODELS]
    for run in runs:
        scoring, importance = run.layer_forwards()
        work = scoring * run.shape.layer_flops(run.tokens) + importance * run.shape.layer_flops(run.prompt)
        pairs = [(run.hours(gpus, "logprob"), run.hours(gpus, "task")) for gpus in args.gpus]
        hours = "".join(f"{f'{logprob:.2f} ({task:.2f})':>18}" for logprob, task in pairs)
        name = f"{run.shape.name}, {run.prompt}"
        print(f"{name:24}{scoring / 1e6:>10.2f}M{importance / 1e6:>10.2f}M{work / 1e15:>9.0f}{hours}")
    print()
    print(f"{'GiB':24}{'weights':>10}{'states':>10}{'KV caches':>10}{'main memory':>13}")
    for run in runs:
        sizes = run.gib()
        row = f"{sizes['weights']:>10.1f}{sizes['states']:>10.1f}{sizes['kv']:>10.1f}{sizes['encoded']:>13.1f}"
        print(f"{f'{run.shape.name}, {run.prompt}':24}{row}")
    print()
    print(f"{'layer-forwards':24}{'hones':>12}{'--heads patch':>18}{'grad_all, fisher':>18}")
    for run in runs:
        exact, *others = run.by_way().values()
        row = f"{exact / 1e6:>11.2f}M" + "".join(f"{f'{cost / 1e6:.2f}M ({cost / exact:.1%})':>18}" for cost in others)
        print(f"{f'{run.shape.name}, {run.prompt}':24}{row}")


if __name__ == "__main__":
    main()
