"""Loading a Hugging Face model with its processor, for the commands, and the memory it is run in."""

import ctypes
import sys
from typing import Any

import torch

from hones_steer import loading
from hones_steer.errors import DataError


def load_model(name: str, *, dtype: str = "auto", device: str = "auto") -> tuple[torch.nn.Module, Any]:
    """A causal LM or VLM in eval mode, and its processor (the tokenizer for a text-only model).

    `dtype` "auto" is the stored type on a GPU and float32 on a CPU; otherwise see `hones_steer.loading.load_model`.

    Raises:
        DataError: as `hones_steer.loading.load_model`, or the model has no processor.
    """
    if dtype == "auto" and loading.find_device(device).type == "cpu":
        dtype = "float32"
    config = loading.load_config(name)
    with loading.loading(f"the {'processor' if loading.is_vlm(config) else 'tokenizer'} of {name!r}"):
        processor = _load_processor(name, config)
    return loading.load_model(name, dtype=dtype, device=device), processor


def keep_freed_memory() -> None:
    """Have this process keep the memory it frees, for the next layer, where its C library is glibc.

    By default glibc gives blocks of some MB back to the system (depending on what was freed before, always or never)
    and asks for them again, which zeroes them page by page: on a CPU, a batch's FFN may then take twice the time. For
    commands; a library leaves that to the process it is in.
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
    if getattr(processor, "image_processor", None) is None:  # AutoProcessor makes do with a tokenizer
        raise DataError(
            f"{name!r} is a vision-language model without a processor for images; "
            "save one beside the model (processor.save_pretrained)"
        )
    return processor
