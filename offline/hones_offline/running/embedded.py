"""The small vision-language model that ships with hones-steer (examples/tiny_vlm/README.md tells how it is made)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hones_steer.errors import DataError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = (
    _PACKAGE / "tiny_vlm",  # installed from a wheel
    _PACKAGE.parents[1] / "examples" / "tiny_vlm" / "checkpoint",  # a working copy
)


def checkpoint() -> Path:
    """Folder of the shipped checkpoint; raises DataError if the installation lacks it."""
    for folder in _FOLDERS:
        if (folder / "model.safetensors").is_file():
            return folder
    raise DataError(
        f"The embedded model is missing: {_FOLDERS[0]} has no model.safetensors; "
        "reinstall it with pip install --force-reinstall 'hones-steer[offline]'."
    )


def load_tiny_vlm() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the embedded model, in float32 and evaluation mode, and its processor. Nothing is downloaded.

    Raises:
        DataError: the installation lacks the checkpoint.
    """
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from hones_steer.loading import no_bars_off_terminal

    no_bars_off_terminal()
    folder = checkpoint()
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    processor = LlavaProcessor.from_pretrained(folder, local_files_only=True)
    return model, processor
