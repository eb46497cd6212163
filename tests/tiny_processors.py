"""Processors for the tiny random models of `tiny_models.py`: real classes over a word-level tokenizer made here."""

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast, Qwen2_5_VLProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

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


ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def text_tokenizer(config: Any) -> PreTrainedTokenizerFast:
    """For a text-only model: no chat template, so prompts are used as they are."""
    return tokenizer(config.vocab_size, {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, **ROLES)


def llava_processor(config: Any) -> LlavaProcessor:
    """For a tiny LLaVA of this config."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": config.image_token_id}
    side = config.vision_config.image_size
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer(config.text_config.vocab_size, special, **ROLES),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )


class _ImageOnlyQwen(Qwen2_5_VLProcessor):
    """The real processor without its video half, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def qwen2_5_vl_processor(config: Any) -> Qwen2_5_VLProcessor:
    """For a tiny Qwen2.5-VL of this config; image size decides how many image tokens a prompt has."""
    vision = config.vision_config
    special = {
        "<pad>": 0,
        "<s>": 1,
        "</s>": 2,
        "<unk>": 3,
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
    }
    return _ImageOnlyQwen(
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
