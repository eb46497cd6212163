"""Processors for tiny models of any image-text architecture: the real class where one is made by hand, else a stand-in.

A stand-in makes of an image the tensors that the model's own `forward` names, and as many image tokens as the model's
`get_image_features` gives features. It says nothing of how a real processor resizes or splits images.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tiny_processors
import torch
from PIL import Image
from tiny_models import FIRST_WORD
from tiny_processors import CHAT, ROLES
from torch import Tensor
from transformers import Qwen2VLProcessor

_REAL: dict[str, Callable[[Any], Any]] = {
    "gemma3": tiny_processors.gemma3_processor,
    "idefics3": tiny_processors.idefics3_processor,
    "internvl": tiny_processors.internvl_processor,
    "llava": tiny_processors.llava_processor,
    "paligemma": tiny_processors.paligemma_processor,
    "qwen2_5_vl": tiny_processors.qwen2_5_vl_processor,
    "qwen2_vl": lambda config: tiny_processors._qwen_processor(Qwen2VLProcessor, config),
    "qwen3_5": tiny_processors.qwen3_vl_processor,
    "qwen3_vl": tiny_processors.qwen3_vl_processor,
    "shieldgemma2": tiny_processors.gemma3_processor,
    "smolvlm": tiny_processors.smolvlm_processor,
}


def processor_for(model: Any) -> tuple[Any, bool]:
    """A processor for a tiny model's text and images, and whether it is of the real class."""
    if make := _REAL.get(model.config.model_type):
        return make(model.config), True
    return StandIn(model), False


def plain_tokenizer(config: Any, special: Mapping[str, int]) -> Any:
    """A word-level tokenizer for a tiny model whose words have none of the ids of special tokens, which end at 9."""
    names = {number: f"<{number}>" for number in range(4, FIRST_WORD)} | {i: token for token, i in special.items()}
    ends = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    tokens = {**ends, **{token: number for number, token in names.items()}}
    return tiny_processors.tokenizer(config.get_text_config().vocab_size, tokens, **ROLES)


class StandIn:
    """Tokenizer and images for one model; the chat template puts one image token before the text, if there is one.

    Raises LookupError if no known shape of an image suits the model.
    """

    def __init__(self, model: Any) -> None:
        config = self._config = model.config
        ids = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
        vocabulary_map = getattr(config, "vocabulary_map", None) or {}
        known = [number for number in (*ids, vocabulary_map.get("<image>")) if isinstance(number, int)]
        self.image_token, self.image_token_id = ("<image>", known[0]) if known else ("", None)
        self.tokenizer = plain_tokenizer(config, {"<image>": known[0]} if known else {})
        self.chat_template = CHAT.replace("IMAGE", self.image_token)
        self.image_processor = self
        self._takes = set(inspect.signature(model.forward).parameters)
        inner = getattr(model, "model", None)
        self._features = getattr(model, "get_image_features", getattr(inner, "get_image_features", None))
        vision = getattr(config, "vision_config", config)
        self.side = _first(vision, "image_size", 16)
        self.patch = _first(vision, "patch_size", 8)
        self.merge = _first(vision, "spatial_merge_size", _first(vision, "merge_size", 2))
        self.frames = _first(vision, "temporal_patch_size", _first(vision, "patch_temporal", 1))
        noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
        images = [Image.new("RGB", (24, 24)), Image.fromarray(noise)]
        errors: list[tuple[int, str]] = []
        self._shape = next((shape for shape in _SHAPES if self._suits(model, shape, images, errors)), None)
        if self._shape is None:
            of_most_parts = max(errors, key=lambda error: error[0], default=(0, "it takes no pixel_values"))
            raise LookupError(f"no stand-in image suits it: {of_most_parts[1]}")

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        """As a processor's."""
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options)

    def __call__(
        self,
        images: Sequence[Image.Image],
        text: Sequence[str],
        return_tensors: str = "pt",
        add_special_tokens: bool = True,
    ) -> dict[str, Tensor]:
        """One text and its image as the model takes them."""
        assert return_tensors == "pt"
        assert len(images) == len(text) == 1
        assert self._shape is not None
        pixels = self._shape(self, images[0])
        ids = self.tokenizer(text[0], add_special_tokens=add_special_tokens)["input_ids"]
        if self.image_token_id is not None:
            at = ids.index(self.image_token_id)
            ids = [*ids[:at], *[self.image_token_id] * self._count(pixels), *ids[at + 1 :]]
        row = torch.tensor([ids])
        inputs = {"input_ids": row, "attention_mask": torch.ones_like(row), **pixels}
        if "mm_token_type_ids" in self._takes:
            inputs["mm_token_type_ids"] = (row == self.image_token_id).int()
        if "token_type_ids" in self._takes:
            inputs["token_type_ids"] = (row == self.image_token_id).long()
        for name, axes in (("image_attention_mask", 1), ("cross_attention_mask", 2)):  # every token sees the image
            if name in self._takes:
                inputs[name] = torch.ones(1, row.shape[1], *[1] * axes, dtype=torch.long)
        return inputs

    def _suits(self, model: Any, shape: "Shape", images: list[Image.Image], errors: list[tuple[int, str]]) -> bool:
        """Whether the model runs with images of this shape, and sees them; if not, the reason goes to `errors`."""
        pixels = shape(self, images[0])
        if not set(pixels) <= self._takes:
            return False
        self._shape = shape
        try:
            with torch.no_grad():
                text = [f"{self.image_token} what is"]
                one, other = (model(**self([image], text)).logits[0, -1] for image in images)
        except Exception as error:  # noqa: BLE001 - whatever a model says of a shape that it does not take
            errors.append((len(pixels), f"{type(error).__name__}: {error}"))
            return False
        if torch.equal(one, other):
            errors.append((len(pixels), "its logits are the same for any image"))
        return not torch.equal(one, other)

    def _count(self, pixels: Mapping[str, Tensor]) -> int:
        """How many image tokens stand for these pixels."""
        if self._features is None:
            return 1
        taken = inspect.signature(self._features).parameters
        passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        with torch.no_grad():
            out = self._features(**{name: value for name, value in pixels.items() if passes_on or name in taken})
        out = getattr(out, "pooler_output", out)
        hidden = self._config.get_text_config().hidden_size
        return sum(part.numel() for part in ([out] if isinstance(out, Tensor) else out)) // hidden


Shape = Callable[[StandIn, Image.Image], dict[str, Tensor]]


def _pixels(image: Image.Image, height: int, width: int) -> Tensor:
    """An image as [3, height, width], around 0."""
    resized = np.asarray(image.convert("RGB").resize((width, height)), dtype=np.float32)
    return torch.from_numpy(resized / 64 - 2).permute(2, 0, 1).contiguous()


def _grid(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    """Patches of a whole image, one after another, with how many there are in height and width."""
    rows = of.merge * min(2, math.ceil(image.height / 24))
    columns = of.merge * 2
    pixels = _pixels(image, rows * of.patch, columns * of.patch)
    patches = pixels.repeat(of.frames, 1, 1, 1).reshape(rows * columns, -1)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, rows, columns]])}


def _merged_grid(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    return {**_grid(of, image), "image_merge_sizes": torch.tensor([of.merge])}


def _grid_of_images(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    """As `_grid`, each patch as a small image (PaddleOCR-VL)."""
    grid = _grid(of, image)
    return {**grid, "pixel_values": grid["pixel_values"].view(-1, 3, of.patch, of.patch)}


def _strip(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    """Patches beside one another, as wide as there are some (MiniCPM-V)."""
    side = of.side // of.patch
    pixels = _pixels(image, of.patch, side * side * of.patch)
    return {"pixel_values": pixels[None], "target_sizes": torch.tensor([[side, side]])}


def _square_patches(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    """Patches of a square image with their mask (SigLIP 2)."""
    pixels = _pixels(image, of.side, of.side)
    side = of.side // of.patch
    patches = pixels.unfold(1, of.patch, of.patch).unfold(2, of.patch, of.patch).permute(1, 2, 3, 4, 0)
    return {
        "pixel_values": patches.reshape(1, side * side, -1),
        "spatial_shapes": torch.tensor([[side, side]]),
        "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.long),
    }


def _placed_patches(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    """Patches of a square image with the place of each (Gemma 4)."""
    side = of.side // of.patch
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return {"pixel_values": _square_patches(of, image)["pixel_values"], "image_position_ids": places[None]}


def _tiles(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    """A base image and one tile, with the size of the whole (LLaVA-NeXT)."""
    pixels = _pixels(image, of.side, of.side)
    return {"pixel_values": torch.stack([pixels, -pixels])[None], "image_sizes": torch.tensor([[of.side, of.side]])}


def _sized(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    return {"pixel_values": _pixels(image, of.side, of.side)[None], "image_sizes": torch.tensor([[of.side, of.side]])}


def _several(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    """A list of one image, and which of its pixels are some (Idefics)."""
    pixels = _pixels(image, of.side, of.side)[None, None]
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, :, 0]).bool()}


def _one(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    return {"pixel_values": _pixels(image, of.side, of.side)[None]}


def _two_resolutions(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    return {**_one(of, image), "high_res_pixel_values": _one(of, image)["pixel_values"]}


def _one_of_several(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    return {"pixel_values": _one(of, image)["pixel_values"][:, None]}


def _tiled(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    """One image of one tile (Mllama)."""
    pixels = _one(of, image)["pixel_values"][:, None, None]
    one = torch.ones(1, 1, dtype=torch.long)
    return {"pixel_values": pixels, "aspect_ratio_ids": one, "aspect_ratio_mask": one[..., None]}


def _with_question(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    """An image with a text for the Q-Former that reads it (InstructBLIP)."""
    ids = torch.tensor([[10, 11, 12]])
    return {**_one(of, image), "qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def _under_another_name(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    """As Video-LLaVA calls images."""
    return {"pixel_values_images": _one(of, image)["pixel_values"]}


def _flat_patches(of: StandIn, image: Image.Image) -> dict[str, Tensor]:
    """Patches in one row, as Fuyu's projection takes them."""
    return {"image_patches": _square_patches(of, image)["pixel_values"]}


_SHAPES: tuple[Shape, ...] = (
    *(
        _one,
        _grid,
        _merged_grid,
        _grid_of_images,
        _strip,
        _square_patches,
        _placed_patches,
        _two_resolutions,
        _several,
        _tiles,
        _sized,
    ),
    *(_with_question, _one_of_several, _tiled, _under_another_name, _flat_patches),
)


def _first(config: Any, name: str, default: int) -> int:
    """A number in a configuration or in one of its parts; of a list the first."""
    found = list(_values(config.to_dict(), name))
    value = found[0] if found else default
    return int(value[0] if isinstance(value, list | tuple) else value)


def _values(settings: Mapping[str, Any], name: str) -> Iterator[Any]:
    if isinstance(settings.get(name), int | list | tuple):
        yield settings[name]
    for value in settings.values():
        if isinstance(value, Mapping):
            yield from _values(value, name)
