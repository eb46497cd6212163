"""Loading a Hugging Face model with its processor, for the commands."""

from typing import Any

import torch

from hones_steer.errors import DataError


def load_model(name: str, *, dtype: str = "auto", device: str = "auto") -> tuple[torch.nn.Module, Any]:
    """A causal LM or VLM in eval mode, and its processor (the tokenizer for a text-only model).

    Args:
        name: local folder or hub name.
        dtype: "float32", "bfloat16", "float16"; "auto" is the stored type on a GPU and float32 on a CPU.
        device: "cpu", "cuda", "cuda:1", …; "auto" spreads the model over the GPUs there are, else the CPU.

    Raises:
        DataError: there is no such model, or it is of a kind transformers cannot load.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )

    has_gpu = torch.cuda.is_available() if device == "auto" else not device.startswith("cpu")
    if dtype == "auto" and not has_gpu:
        dtype = "float32"
    placement = ("auto" if has_gpu else None) if device == "auto" else device
    try:
        config = AutoConfig.from_pretrained(name)
        is_vlm = type(config) in AutoModelForImageTextToText._model_mapping
        model_class = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
        processor = (AutoProcessor if is_vlm else AutoTokenizer).from_pretrained(name)
        model = model_class.from_pretrained(name, dtype=dtype, device_map=placement)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"cannot load the model {name!r}: {reason}") from error
    return model.eval(), processor
