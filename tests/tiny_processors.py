"""Processors for the tiny random models of `tiny_models.py`: real classes over a word-level tokenizer made here."""

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma3Processor,
    Idefics3Processor,
    InternVLProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

WORDS = [
    "a",
    "an",
    "the",
    "what",
    "is",
    "color",
    "of",
    "square",
    "circle",
    "red",
    "blue",
    "green",
    "on",
    "left",
    "right",
    "top",
    "one",
    "two",
    "three",
    "Yes",
    "No",
    "Question",
    ":",
    ".",
    "?",
    "Answer",
    "question",
    "with",
    "short",
    "phrase",
    "Transcribe",
    "text",
    "inside",
    "box",
    "Output",
    "only",
    "Describe",
    "image",
    "in",
    "sentence",
    "Candidate",
    "Does",
    "candidate",
    "correctly",
    "describe",
    "exactly",
    "or",
    "user",
    "assistant",
    "and",
    "cat",
    "dog",
    "sits",
    "mat",
    "big",
    "small",
    "city",
    "town",
]
CHAT = (
    "{{ bos_token }}user {% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}IMAGE {% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %} assistant"
)


def tokenizer(size: int, special: dict[str, int], **roles: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with exactly the ids 0..size-1; `special` gives some tokens fixed ids."""
    taken = {i: token for token, i in special.items()}
    rest = iter([*WORDS, *(f"w{i}" for i in range(size))])
    vocabulary = {taken.get(i) or next(rest): i for i in range(size)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=roles["unk_token"]))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    if "bos_token" in roles:
        bos = roles["bos_token"]
        raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, extra_special_tokens=[t for t in special if t not in roles.values()], **roles
    )


_SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def text_tokenizer(config: Any) -> PreTrainedTokenizerFast:
    """For a text-only model: no chat template, so prompts are used as they are."""
    return tokenizer(config.get_text_config().vocab_size, _SPECIAL, **ROLES)


def llava_processor(config: Any) -> LlavaProcessor:
    """For a tiny LLaVA of this config."""
    special = {**_SPECIAL, "<image>": config.image_token_id}
    side = config.vision_config.image_size
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer(config.text_config.vocab_size, special, **ROLES),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )


def _image_only(kind: Any) -> Any:
    """A real processor's class without its video half, which needs torchvision."""

    class ImageOnly(kind):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    return ImageOnly


def _qwen_processor(kind: Any, config: Any) -> Any:
    """For a tiny Qwen VL of this config; image size decides how many image tokens a prompt has."""
    vision = config.vision_config
    special = {
        **_SPECIAL,
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
    }
    return _image_only(kind)(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            min_pixels=(vision.patch_size * vision.spatial_merge_size) ** 2,
            max_pixels=(vision.patch_size * vision.spatial_merge_size) ** 2 * 12,
        ),
        tokenizer=tokenizer(config.text_config.vocab_size, special, **ROLES),
        video_processor=None,
        chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


def qwen2_5_vl_processor(config: Any) -> Any:
    """For a tiny Qwen2.5-VL."""
    return _qwen_processor(Qwen2_5_VLProcessor, config)


def qwen3_vl_processor(config: Any) -> Any:
    """For a tiny Qwen3-VL."""
    return _qwen_processor(Qwen3VLProcessor, config)


def idefics3_processor(config: Any) -> Idefics3Processor:
    """For a tiny Idefics3 of this config; images are not split."""
    special = {**_SPECIAL, "<image>": config.image_token_id, "<fake_token_around_image>": 6, "<global-img>": 7}
    side = config.vision_config.image_size
    return Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": side}, max_image_size={"longest_edge": side}, do_image_splitting=False
        ),
        tokenizer=tokenizer(config.text_config.vocab_size, special, **ROLES),
        image_seq_len=(side // config.vision_config.patch_size // config.scale_factor) ** 2,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )


smolvlm_processor = idefics3_processor  # SmolVLM's own needs a package more for its videos


def internvl_processor(config: Any) -> Any:
    """For a tiny InternVL of this config."""
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image>"}
    names["video_token"] = "<video>"
    special = {**_SPECIAL, "<image>": config.image_token_id, "<img>": 6, "</img>": 7, "<video>": 8}
    words = tokenizer(config.text_config.vocab_size, special, **ROLES)
    for role, token in names.items():
        setattr(words, role, token)
        setattr(words, f"{role}_id", words.convert_tokens_to_ids(token))
    side = config.vision_config.image_size[0]
    return _image_only(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(size={"height": side, "width": side}, crop_to_patches=False),
        tokenizer=words,
        video_processor=None,
        image_seq_length=config.image_seq_length,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )


def gemma3_processor(config: Any) -> Gemma3Processor:
    """For a tiny Gemma 3 of this config."""
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    ids = (config.boi_token_index, config.eoi_token_index, config.image_token_index)
    words = tokenizer(
        config.text_config.vocab_size, {**_SPECIAL, **dict(zip(names.values(), ids, strict=True))}, **ROLES
    )
    for (role, token), number in zip(names.items(), ids, strict=True):
        setattr(words, role, token)
        setattr(words, f"{role}_id", number)
    side = config.vision_config.image_size
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": side, "width": side}),
        tokenizer=words,
        image_seq_length=config.mm_tokens_per_image,
        chat_template=CHAT.replace("IMAGE", "<boi>"),
    )


def paligemma_processor(config: Any) -> PaliGemmaProcessor:
    """For a tiny PaliGemma of this config; it has no chat template, as the real one."""
    words = tokenizer(config.text_config.vocab_size, {**_SPECIAL, "<image>": config.image_token_id}, **ROLES)
    words.image_token, words.image_token_id = "<image>", config.image_token_id
    side = config.vision_config.image_size
    images = SiglipImageProcessorPil(size={"height": side, "width": side})
    images.image_seq_length = config.text_config.num_image_tokens
    return PaliGemmaProcessor(image_processor=images, tokenizer=words)
