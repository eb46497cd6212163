"""Loading of Hugging Face models; every failure is a DataError of one sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from hones_steer.errors import DataError

# Errors of transformers about a model that is missing, unknown, damaged or inconsistent.
_UNLOADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


def no_bars_off_terminal() -> None:
    """Keep transformers' loading bars out of logs and pipes."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def load_config(name: str) -> Any:
    """Load the configuration of a model folder or a Hub name.

    Raises:
        DataError: there is no such model, or it is of a kind transformers does not know.
    """
    from transformers import AutoConfig

    no_bars_off_terminal()
    if _is_path(name) and not Path(name, "config.json").is_file():
        raise DataError(f"cannot load the model {name!r}: there is no {name}/config.json; name a model folder")
    # trust_remote_code=False, here and below, refuses remote code; without it transformers asks on the terminal.
    with loading(f"the model {name!r}"):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_model(name: str, *, dtype: str = "auto", device: str = "cpu") -> torch.nn.Module:
    """Load a causal LM or VLM, in eval mode.

    Args:
        name: a local folder or a Hub name.
        dtype: "float32", "bfloat16", "float16"; "auto" is the stored type.
        device: "cpu", "cuda", "cuda:1", …; "auto" spreads the model over the GPUs there are, else the CPU.

    Raises:
        DataError: there is no such model or device, the model is of a kind transformers cannot load, or its files are
            damaged or incomplete.
    """
    place = find_device(device)
    config = load_config(name)
    with loading(f"the weights of {name!r}"):
        return _load_weights(name, config, dtype, place, spread=device == "auto").eval()


def empty_model(config: Any) -> torch.nn.Module:
    """Build the model of a configuration without weights (on the meta device).

    Raises DataError if transformers cannot.
    """
    with loading("the model of this configuration"), torch.device("meta"):
        model: torch.nn.Module = _auto_class(config).from_config(config, trust_remote_code=False)
    return model


def find_checkpoint(name: str) -> Path:
    """The folder of a model: `name` itself, or where the Hub's was downloaded to (safetensors, no other weights).

    Raises:
        DataError: there is no such model, or it cannot be downloaded.
    """
    if _is_path(name):
        if not Path(name, "config.json").is_file():
            raise DataError(f"{name}: has no config.json; name a model folder or a Hub name")
        return Path(name)
    from huggingface_hub import snapshot_download

    with loading(f"the model {name!r}"):
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*"]
        return Path(snapshot_download(name, allow_patterns=patterns))


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn errors of transformers inside the block into a DataError: "cannot load `what`" and the reason."""
    try:
        yield
    except _UNLOADABLE as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(f"cannot load {what}: {reason}") from error


def _is_path(name: str) -> bool:
    """Whether a name is a path. A Hub name (`owner/model`) is one only if such a folder exists."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU if there is one. Raises DataError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch built without CUDA
        raise DataError(f"there is no device {name!r} here ({str(error).splitlines()[0]}); try --device cpu") from error
    return device


def is_vlm(config: Any) -> bool:
    """Whether a model of this configuration takes images and returns text."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _auto_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if is_vlm(config) else AutoModelForCausalLM


def _load_weights(name: str, config: Any, dtype: str, device: torch.device, *, spread: bool) -> torch.nn.Module:
    placement: dict[str, Any] = {}
    if spread and torch.cuda.device_count() > 1:
        placement["device_map"] = "auto"
    load: Any = _auto_class(config).from_pretrained  # its annotation lacks the report
    model: torch.nn.Module
    model, report = load(
        name,
        dtype=dtype,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **placement,
    )
    if misfits := sorted(report["mismatched_keys"]):
        raise DataError(
            f"{name!r}: {misfits[0][0]} has shape {list(misfits[0][1])}, where config.json asks for "
            f"{list(misfits[0][2])}; the two do not belong together"
        )
    if missing := sorted(report["missing_keys"]):
        raise DataError(
            f"{name!r} lacks {len(missing)} of its weights, the first being {missing[0]!r}; get the whole model"
        )
    return model if placement else model.to(device)
