"""Tiny pipelines with several denoisers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    KandinskyV22CombinedPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WIDTH = 16
LETTERS = ["<pad>", "<s>", "</s>", " ", *"abcdefghijklmnopqrstuvwxyz"]
WAN = {
    "steps": 4,
    "batch_size": 2,
    "prompts": ["a cat", "a dog"],
    "height": 16,
    "width": 16,
    "arguments": {"num_frames": 5, "max_sequence_length": 8},
}
KANDINSKY = {
    "steps": 3,
    "batch_size": 2,
    "prompts": ["a cat", "a dog"],
    "height": 32,
    "width": 32,
    "arguments": {"prior_num_inference_steps": 5},
}


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer that knows letters."""
    made = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<pad>"))
    made.pre_tokenizer = Split(Regex("."), "isolated")
    made.post_processor = TemplateProcessing(single="<s> $0 </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=8
    )


def wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=16, ffn_dim=16, num_layers=2, rope_max_seq_len=64,
    ).eval()  # fmt: skip


def wan(boundary: float | None = 0.6, **components: Any) -> WanPipeline:
    """Wan 2.2: one transformer for the noisy steps and another one for the others."""
    torch.manual_seed(0)
    video = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    text = T5EncoderModel(
        T5Config(vocab_size=len(LETTERS), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    )
    parts: dict[str, Any] = {
        "tokenizer": letters(),
        "text_encoder": text.eval(),
        "vae": video.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "transformer": wan_transformer(),
        "transformer_2": wan_transformer(),
        **components,
    }
    return _quiet(WanPipeline(**parts, boundary_ratio=boundary))


def kandinsky() -> KandinskyV22CombinedPipeline:
    """A prior and a decoder, each with its own scheduler."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=8, cross_attention_dim=WIDTH, attention_head_dim=8,
        encoder_hid_dim=WIDTH, encoder_hid_dim_type="image_proj", addition_embed_type="image",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 16), norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    movq = VQModel(
        block_out_channels=(32, 32), norm_num_groups=4, latent_channels=4, num_vq_embeddings=12, vq_embed_dim=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("AttnUpDecoderBlock2D",) * 2, norm_type="spatial",
    )  # fmt: skip
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=WIDTH,
                             num_embeddings=8, additional_embeddings=4)  # fmt: skip
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(LETTERS), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, projection_dim=WIDTH, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )
    )  # fmt: skip
    image = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=32,
            patch_size=16, projection_dim=WIDTH,
        )
    )  # fmt: skip
    return _quiet(
        KandinskyV22CombinedPipeline(
            unet=unet.eval(), scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
            movq=movq.eval(), prior_prior=prior.eval(), prior_image_encoder=image.eval(),
            prior_text_encoder=text.eval(), prior_tokenizer=letters(),
            prior_scheduler=UnCLIPScheduler(
                variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000,
                clip_sample_range=5.0,
            ),
            prior_image_processor=CLIPImageProcessor(size={"height": 32, "width": 32}),
        )
    )  # fmt: skip


def _quiet(pipeline: DiffusionPipeline) -> Any:
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            for parameter in component.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
