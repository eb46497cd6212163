"""Put the vision-language model together: SmolLM2-135M-Instruct as it is, with the tower and projector of this folder.

    pip install gguf
    python -m examples.smollm2.get_model --output runs/smollm2/model
    python -m examples.smolvlm.get_model --text runs/smollm2/model --output runs/smolvlm/model

Run it from the repository root. The language model's weights are not changed; nor does it get a new token: `<image>` is
a name for `<gh_stars>`, one of the tokens that SmolLM2's tokenizer keeps for source code. Tower and projector are
checked before anything is written: the file says by which language model and tokenizer they were trained (sha256).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hones_offline.running.models import load_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from examples.tiny_vlm.train import released_name
from hones_steer.errors import DataError
from hones_steer.files import write_atomically

HERE = Path(__file__).parent
CONNECTOR = HERE / "connector.safetensors"
CARD = HERE / "card.md"
STATE = "state.pt"  # what train.py keeps in its run folder
IMAGE, RESERVED = "<image>", "<gh_stars>"
START, END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TOKENIZER: Any = PreTrainedTokenizerFast  # these two constructors have no annotations
_PROCESSOR: Any = LlavaProcessor


def load_text(folder: Path) -> tuple[Any, Any]:
    """Load the language model in float32, and its tokenizer.

    Raises:
        DataError: the folder holds no whole model, or one with another tokenizer than SmolLM2's.
    """
    model, tokenizer = load_model(str(folder), dtype="float32", device="cpu")
    known = tokenizer.get_vocab()
    for token in (RESERVED, START, END):
        if token not in known:
            raise DataError(
                f"the tokenizer of {folder} has no token {token!r}, so it is not SmolLM2's; "
                "give the folder that examples.smollm2.get_model wrote"
            )
    return model, tokenizer


def build(text: Any, tokenizer: Any, vision: Any) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Put a new tower and projector before a language model, which becomes part of the result, and make its processor.

    `vision` is a CLIPVisionConfig. The tower sees square pictures of `vision.image_size`; each patch of one becomes an
    image token.
    """
    side, patch = vision.image_size, vision.patch_size
    config = LlavaConfig(
        vision_config=vision,
        text_config=text.config,
        image_token_index=tokenizer.convert_tokens_to_ids(RESERVED),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(side // patch) ** 2,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = text.model, text.lm_head
    end = tokenizer.convert_tokens_to_ids(END)
    model.generation_config.bos_token_id = tokenizer.convert_tokens_to_ids(START)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    processor: LlavaProcessor = _PROCESSOR(
        images,
        _with_image_token(tokenizer, text.config.max_position_embeddings),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return model.eval(), processor


def _with_image_token(tokenizer: Any, longest: int) -> Any:
    """The same tokenizer with RESERVED called IMAGE."""
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = raw["model"]["vocab"]
    vocabulary[IMAGE] = vocabulary.pop(RESERVED)
    for token in raw["added_tokens"]:
        if token["content"] == RESERVED:
            token["content"] = IMAGE
    return _TOKENIZER(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)),
        bos_token=START,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


# ----------------------------------------------------------------------------------------- tower and projector


def parts_of(model: LlavaForConditionalGeneration) -> dict[str, nn.Module]:
    """The modules that are trained, by the names that their weights begin with."""
    return {"vision_tower": model.model.vision_tower, "multi_modal_projector": model.model.multi_modal_projector}


def identity_of(text: Any, tokenizer: Any) -> dict[str, str]:
    """The sha256 of a language model's weights and of its tokenizer's vocabulary, in hexadecimal."""
    weights = hashlib.sha256()
    for name, value in sorted(text.model.state_dict().items()):
        weights.update(f"{name} {list(value.shape)}".encode())
        weights.update(value.float().contiguous().numpy().tobytes())
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return {"language_model": weights.hexdigest(), "tokenizer": hashlib.sha256(vocabulary).hexdigest()}


def save_connector(model: LlavaForConditionalGeneration, identity: Mapping[str, str], file: Path) -> None:
    """Write tower and projector in float16, with what they were trained through, as one file."""
    weights = {
        f"{part}.{name}": value.half().contiguous()
        for part, module in parts_of(model).items()
        for name, value in module.state_dict().items()
    }
    vision: Any = model.config.vision_config
    about = {**identity, "vision_config": vision.to_diff_dict()}
    # One entry, because safetensors writes several in any order.
    write_atomically(file, save(weights, {"about": json.dumps(about, sort_keys=True)}))


def assemble(text_folder: Path, connector: Path = CONNECTOR) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the language model and put the trained tower and projector before it, in float32 and evaluation mode.

    Raises:
        DataError: a part is missing, unfinished or damaged, or the parts do not belong together.
    """
    about, weights = read_connector(connector)
    text, tokenizer = load_text(text_folder)
    identity = identity_of(text, tokenizer)
    for part, title in (("tokenizer", "tokenizer"), ("language_model", "weights")):
        if identity[part] != about[part]:
            raise DataError(
                f"{connector} was trained with another language model than {text_folder} holds: the sha256 of the "
                f"{title} is {identity[part][:12]}, not {about[part][:12]}; make the folder anew with "
                "examples.smollm2.get_model"
            )
    model, processor = build(text, tokenizer, CLIPVisionConfig(**about["vision_config"]))
    wanted = {f"{part}.{name}": x for part, m in parts_of(model).items() for name, x in m.state_dict().items()}
    for name in sorted(wanted.keys() | weights.keys()):
        found, asked = (list(x[name].shape) if name in x else None for x in (weights, wanted))
        if found != asked:
            raise DataError(f"{connector} is damaged: {name} has shape {found}, not {asked}; get the file anew")
    for part, module in parts_of(model).items():
        module.load_state_dict({name: weights[f"{part}.{name}"].float() for name in module.state_dict()})
    return model, processor


def read_connector(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `save_connector` wrote: the identity and the tower's configuration, and the weights by name.

    Raises:
        DataError: the file is missing, that of an unfinished training, damaged, or another.
    """
    if not file.is_file():
        state = (file if file.is_dir() else file.parent) / STATE
        if state.is_file():
            raise DataError(f"{state.parent} holds a training that is not finished; run examples.smolvlm.train again")
        raise DataError(f"there is no {file}; train it with examples.smolvlm.train")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        weights = load_file(file)
    except SafetensorError as error:
        raise DataError(f"{file} cannot be read: {error}; get the file anew") from error
    if "about" not in metadata:
        raise DataError(
            f"{file} does not say what it was trained with; give the file that examples.smolvlm.train wrote"
        )
    return json.loads(metadata["about"]), weights


# ------------------------------------------------------------------------------------------------ the checkpoint


def save_model(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write a complete float32 checkpoint with the key names of LLaVA-1.5's release, which vLLM reads too."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({released_name(name): value for name, value in load_file(file).items()}, file, {"format": "pt"})
    if CARD.is_file():
        shutil.copy(CARD, folder / "README.md")


def main() -> None:
    """Write the checkpoint into --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="DIR", help="what examples.smollm2.get_model wrote")
    parser.add_argument("--connector", type=Path, default=CONNECTOR, metavar="FILE", help="tower and projector")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    try:
        model, processor = assemble(args.text, args.connector)
    except DataError as error:
        parser.error(str(error))
    save_model(model, processor, args.output)
    trained = sum(p.numel() for part in parts_of(model).values() for p in part.parameters())
    whole = sum(p.numel() for p in model.parameters())
    print(f"{args.output}: {whole / 1e6:.1f}M parameters, {trained / 1e6:.1f}M of them tower and projector, float32")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
