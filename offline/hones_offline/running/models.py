"""Load a Hugging Face model with its processor, and set how the process keeps memory; both for the commands."""

import ctypes
import sys
from typing import Any

import torch

from hones_steer import loading
from hones_steer.errors import DataError


def load_model(name: str, *, dtype: str = "auto", device: str = "auto") -> tuple[torch.nn.Module, Any]:
    """Load a causal LM or VLM in eval mode, and its processor (the tokenizer for a text-only model).

    `dtype` "auto" is the stored type on a GPU and float32 on a CPU. For the other values and for `device` see
    `hones_steer.loading.load_model`.

    Raises:
        DataError: `hones_steer.loading.load_model` refuses the model, or the model has no processor.
    """
    if dtype == "auto" and loading.find_device(device).type == "cpu":
        dtype = "float32"
    config = loading.load_config(name)
    with loading.loading(f"the {'processor' if loading.is_vlm(config) else 'tokenizer'} of {name!r}"):
        processor = _load_processor(name, config)
    return loading.load_model(name, dtype=dtype, device=device), processor


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees, for the next layer; does nothing unless its C library is glibc.

    By default glibc returns blocks of a few MB to the system (always or never, depending on what was freed before) and
    requests them again, which zeroes them page by page: on a CPU, a batch's FFN may then take twice the time. Only
    commands call this; a library leaves such settings to the process that it runs in.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def _load_processor(name: str, config: Any) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    if not loading.is_vlm(config):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    if getattr(processor, "image_processor", None) is None:  # AutoProcessor then returns a mere tokenizer
        raise DataError(
            f"{name!r} is a vision-language model without a processor for images; "
            "save one beside the model (processor.save_pretrained)"
        )
    return processor
