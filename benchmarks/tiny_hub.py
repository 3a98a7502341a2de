"""What tests of diffusers load from the hub: tiny models with random weights, and tokenizers that know letters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import transformers
from tiny_pipelines import LETTERS, tokenizer
from transformers import PreTrainedTokenizerFast  # by this name in this module diffusers opens its subclass
from transformers.image_processing_utils import BaseImageProcessor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_HIDDEN = 16
_QWEN = 151643  # tokens of Qwen before its marks, in whose numbers its configurations speak
_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
          "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
          "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
_DECODER: dict[str, Any] = {
    "hidden_size": _HIDDEN, "intermediate_size": _HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ENCODER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_SEEN: dict[str, Any] = {
    "depth": 1, "embed_dim": _HIDDEN, "hidden_size": _HIDDEN, "intermediate_size": _HIDDEN, "num_heads": 2,
    "out_hidden_size": _HIDDEN,
}  # fmt: skip
_ROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10000.0}
_T5: dict[str, Any] = {"vocab_size": 1000, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}

MODELS: dict[str, Callable[[], Any]] = {
    "BertModel": lambda: transformers.BertConfig(vocab_size=1000, **_ENCODER),
    "Gemma3ForConditionalGeneration": lambda: transformers.Gemma3Config(
        text_config={**_DECODER, "vocab_size": 1000, "hidden_size": 32, "head_dim": 16},
        mm_tokens_per_image=1, image_token_index=999, vision_config={**_ENCODER, "image_size": 28, "patch_size": 14},
    ),
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(vocab_size=1000, **_DECODER),
    "Qwen2VLForConditionalGeneration": lambda: transformers.Qwen2VLConfig(
        text_config={**_DECODER, "vocab_size": 152064, "rope_parameters": _ROPE},
        vision_config={**_SEEN, "hidden_size": _HIDDEN},
    ),
    "Qwen3VLForConditionalGeneration": lambda: transformers.Qwen3VLConfig(
        text_config={**_DECODER, "vocab_size": 152064, "head_dim": 8, "rope_parameters": _ROPE},
        vision_config={**_SEEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "SiglipVisionModel": lambda: transformers.SiglipVisionConfig(image_size=30, patch_size=2, **_ENCODER),
    "T5EncoderModel": lambda: transformers.T5Config(**_T5),
    "UMT5EncoderModel": lambda: transformers.UMT5Config(**_T5),
}  # fmt: skip


class PictureReader(PreTrainedTokenizerFast):
    """A tokenizer that reads pictures, too, as processors of Qwen do; theirs need torchvision."""

    tokenizer = property(lambda self: self)

    @property
    def image_processor(self) -> Any:
        """What makes patches of pictures."""
        size = {"shortest_edge": 56 * 56, "longest_edge": 64 * 64}
        return transformers.Qwen2VLImageProcessor(patch_size=self.init_kwargs["patch_size"], size=size)

    def __call__(self, text: Any = None, images: Any = None, videos: None = None, **options: Any) -> Any:
        if images is None:
            return super().__call__(text, **options)
        pictures = self.image_processor(images, return_tensors="pt")
        counts = iter((pictures["image_grid_thw"].prod(-1) // 4).tolist())
        marked = [re.sub(r"<\|image_pad\|>", lambda mark: mark[0] * next(counts), one) for one in text]
        read = super().__call__(marked, **options)
        is_picture = (read["input_ids"] == self.convert_tokens_to_ids("<|image_pad|>")).int()
        return transformers.BatchEncoding({**read, **pictures, "mm_token_type_ids": is_picture})


def _tokenizer(
    name: str,
    options: dict[str, Any],
    kind: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast,
) -> Any:
    length = options.get("model_max_length", 77)
    if "Qwen" not in name and "cosmos3" not in name:
        return tokenizer(length)
    fill = [f"<{i}>" for i in range(len(LETTERS), _QWEN)]
    named = {f"{mark[2:-6]}_token": mark for mark in _MARKS if "_pad" in mark}
    made = tokenizer(length, [*fill, *_MARKS], named, kind)
    made.add_special_tokens({"additional_special_tokens": _MARKS}, replace_extra_special_tokens=False)
    return made


def _processor(kind: type, name: str) -> Any:
    if "VL" not in name:
        return _tokenizer(name, {})
    made = _tokenizer(name, {}, PictureReader)
    made.init_kwargs["patch_size"] = 16 if "3" in kind.__name__ else 14
    return made


def _images_of(kind: type) -> dict[str, Any]:
    return {"size": {"height": 32, "width": 32}} if "DPT" in kind.__name__ else {}


@contextmanager
def tiny_hub() -> Iterator[None]:
    """Within the block, what is loaded from the hub is made instead."""

    def model(kind: Any, name: str, **options: Any) -> Any:
        if kind.__name__ not in MODELS:
            raise ValueError(f"no tiny {kind.__name__}")
        return kind(MODELS[kind.__name__]())

    made: dict[Any, Callable[..., Any]] = {
        PreTrainedTokenizerBase: lambda kind, name, **options: _tokenizer(name, options),
        transformers.AutoTokenizer: lambda kind, name, **options: _tokenizer(name, options),
        transformers.AutoProcessor: lambda kind, name, **options: _processor(kind, name),
        transformers.AutoConfig: lambda kind, name, **options: transformers.T5Config(**_T5),
        transformers.PreTrainedModel: model,
        transformers.ProcessorMixin: lambda kind, name, **options: _processor(kind, name),
        BaseImageProcessor: lambda kind, name, **options: kind(**_images_of(kind), **options),
        transformers.FeatureExtractionMixin: lambda kind, name, **options: kind(**options),
    }
    with ExitStack() as stack:
        for kind, make in made.items():
            stack.enter_context(mock.patch.object(kind, "from_pretrained", classmethod(make)))
        yield
