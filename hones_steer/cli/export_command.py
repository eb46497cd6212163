"""``hones export`` and ``hones import``: profiles written for other software, and read back from PEFT."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

from hones_steer.cli.output import command_parser, print_json, report_written
from hones_steer.profile import load_profile, save_profile


def export(argv: Sequence[str]) -> int:
    """``hones export FILE MODEL --to peft|lora|merged --out FOLDER``: a profile for other software."""
    parser = command_parser(
        "export",
        "Write a profile as something that other software loads:\n"
        "  peft    an IA3 adapter for PEFT, exact\n"
        "  lora    a LoRA adapter for PEFT, vLLM and other engines, exact up to --max-rank changed neurons per layer\n"
        "  merged  a complete checkpoint with the scales in its weights, read and written file by file",
        "hones export vqa.safetensors llava-hf/llava-1.5-7b-hf --to peft --out vqa-ia3\n"
        "  hones export vqa.safetensors ./model --to lora --max-rank 128 --truncate svd --out vqa-lora\n"
        "  hones export vqa.safetensors ./model --to merged --out model-vqa",
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="a profile (.safetensors)")
    add("model", metavar="MODEL", help="the model it was made for: a folder or a Hub name")
    add("--to", required=True, choices=("peft", "lora", "merged"), help="what to write")
    add("--out", required=True, metavar="FOLDER", type=Path, help="a folder that does not exist yet")
    add("--max-rank", metavar="N", type=int, default=512, help="lora: highest rank of a layer (default: 512, vLLM's)")
    add("--truncate", choices=("svd",), help="lora: approximate layers above the highest rank instead of refusing")
    add("--allow-mismatch", action="store_true", help="accept another model of the same shapes, a fine-tune say")
    add("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(argv)
    profile = load_profile(options.file)
    summary: dict[str, object] = {
        "to": options.to,
        "folder": str(options.out),
        "task": profile.task,
        "digest": profile.digest,
        "neurons": profile.num_neurons,
    }
    if options.to == "merged":
        from huggingface_hub.utils.tqdm import tqdm

        from hones_steer.export.merged import merge_into

        progress = functools.partial(tqdm, desc="weight files", disable=None)  # None: off where there is no terminal
        merge_into(profile, options.model, options.out, allow_mismatch=options.allow_mismatch, progress=progress)
        return _exported(options, summary, "merged into the weights")
    from hones_steer.export.checkpoint import open_checkpoint
    from hones_steer.export.lora import export_lora
    from hones_steer.export.peft import export_peft
    from hones_steer.loading import load_model

    if options.to == "peft":  # takes the names of the modules, not their weights
        export_peft(profile, open_checkpoint(options.model).model, options.out, allow_mismatch=options.allow_mismatch)
        return _exported(options, summary, "as an IA3 adapter")
    result = export_lora(
        profile,
        load_model(options.model),
        options.out,
        max_rank=options.max_rank,
        truncate=options.truncate,
        allow_mismatch=options.allow_mismatch,
    )
    rank = max(result.ranks.values())
    how = f"truncated, off by up to {result.error:.2%} of a layer's change"
    if not result.truncated:
        how = f"exact but for rounding, off by up to {result.error:.1g} of a layer's change"
    return _exported(options, {**summary, "rank": rank, "error": result.error}, f"as a LoRA of rank {rank}, {how}")


def _exported(options: argparse.Namespace, summary: dict[str, object], how: str) -> int:
    if options.json:
        print_json(summary)
    else:
        print(f"{options.out}: {summary['neurons']:,} neurons of {summary['task']!r}, {how}")
    return 0


def import_(argv: Sequence[str]) -> int:
    """``hones import FOLDER --out FILE``: an IA3 adapter of PEFT as a profile."""
    parser = command_parser(
        "import",
        "Read an IA3 adapter of PEFT as a profile. One that `hones export` has written needs nothing else; for one\n"
        "that was trained with PEFT, name the task and the model it was trained on.",
        "hones import vqa-ia3 --out vqa.safetensors\n"
        "  hones import my-adapter --task vqa --model llava-hf/llava-1.5-7b-hf --out vqa.safetensors",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="the adapter's folder")
    add("--out", required=True, metavar="FILE", type=Path, help="the profile to write")
    add("--task", help="the task's name (default: the exported profile's)")
    add("--model", help="the model it was trained on: a folder or a Hub name")
    add("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(argv)
    from hones_steer.export.checkpoint import open_checkpoint
    from hones_steer.importing import import_peft

    model = open_checkpoint(options.model).model if options.model else None
    profile = import_peft(options.folder, model=model, task=options.task)
    save_profile(profile, options.out)
    report_written([(profile, options.out)], {}, options.json)
    return 0
