"""Every denoiser class of diffusers, tiny and with random weights.

A class gets the configuration `SIZES` gives its arguments, and inputs by their names (`Inputs`); what is particular
to it stands in `PARTICULAR`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import iter_modules
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models import transformers, unets
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor, nn

# Classes of these packages that denoise nothing.
HELPERS = {
    "MotionAdapter": "weights that UNetMotionModel takes over",
    "MiniMaxMusic3RVQDepthDecoder": "a decoder of audio tokens",
}

WIDTH, TEXT = 32, 5  # of hidden states and of all conditions; tokens of a text
GRID = (8, 8)  # of a latent image; a video has two

# Values for arguments of constructors, by name.
_COUNTS = dict.fromkeys(
    ("num_layers", "n_layers", "nlayers", "num_hidden_layers", "depth", "dit_depth", "num_visual_blocks",
     "num_attention_heads", "num_heads", "n_heads", "nheads", "dit_heads", "num_cross_attention_heads",
     "num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_key_value_attention_heads", "text_num_attention_heads",
     "text_num_key_value_heads", "audio_num_attention_heads", "cross_attn_num_heads", "block_num_heads",
     "motion_num_attention_heads", "num_frames", "sample_frames", "video_length"),
    2,
)  # fmt: skip
_ONES = dict.fromkeys(
    ("num_single_layers", "num_refiner_layers", "n_refiner_layers", "num_mmdit_layers", "num_single_dit_layers",
     "num_text_blocks", "layers_per_block", "num_res_blocks", "num_layerwise_text_blocks", "num_refiner_text_blocks",
     "approximator_layers", "perceiver_num_layers", "temporal_compression_ratio", "motion_layers_per_block"),
    1,
)  # fmt: skip
_HEADS = dict.fromkeys(
    ("attention_head_dim", "head_dim", "cross_attention_head_dim", "linear_head_dim", "audio_attention_head_dim"), 16
)
_WIDTHS = dict.fromkeys(
    ("hidden_size", "dim", "dit_dim", "model_dim", "embed_dim", "token_dim", "text_dim", "text_embed_dim",
     "joint_attention_dim", "caption_projection_dim", "caption_channels", "cross_attention_dim", "text_hidden_dim",
     "pooled_projection_dim", "text_in_dim", "cap_feat_dim", "context_in_dim", "condition_dim", "dit_text_dim",
     "in_text_dim", "in_text_dim2", "llm_features_dim", "text_emb_dim", "cond_token_dim", "global_cond_dim",
     "encoder_hidden_size", "cond_embed_dim", "global_states_input_dim", "cross_attention_input_dim", "d_model",
     "audio_cross_attention_dim", "embedding_dim", "time_embed_dim", "time_dim", "freq_dim", "encoder_hid_dim",
     "time_proj_dim", "timestep_embed_dim", "timestep_channels", "timestep_guidance_channels", "adaln_dim",
     "adaln_lora_dim", "timestep_features_dim", "intermediate_size", "ffn_dim", "ff_dim", "ffn_hidden_size",
     "text_intermediate_size", "ff_inner_dim", "moe_intermediate_dim", "approximator_hidden_dim", "time_step_dim",
     "text_embed_2_dim", "image_embed_dim", "image_proj_dim", "text_encoder_dim", "fourier_embedding_dim",
     "time_embedding_dim", "time_embed_hidden_dim", "conditioning_dim", "clip_text_pooled_in_channels",
     "crossattn_proj_in_channels", "encoder_hidden_states_channels", "micro_cond_encode_dim", "dim_cond",
     "pair_repr_dim", "img_context_dim_out", "approximator_num_channels", "timestep_ratio_embedding_dim"),
    WIDTH,
)  # fmt: skip
_CHANNELS = dict.fromkeys(
    ("in_channels", "out_channels", "latent_dim", "io_channels", "in_visual_dim", "out_visual_dim", "in_audio_dim",
     "out_audio_dim", "audio_in_channels", "audio_out_channels", "latent_channel", "cond_in_channels"),
    4,
)  # fmt: skip
_ROPE = ("axes_dims_rope", "axes_dims", "axes_dim_rope", "rope_axes_dim", "rope_dim", "rope_dim_list")
SIZES: dict[str, Any] = {
    **_COUNTS, **_ONES, **_HEADS, **_WIDTHS, **_CHANNELS, "text_len": TEXT, "text_len_t5": TEXT, "norm_num_groups": 4,
    "groups": 4, "sample_size": 8, "sample_height": 8, "sample_width": 8, "max_text_seq_length": TEXT,
    "rope_max_seq_len": 32, "pos_embed_max_size": 16, "norm_in_type": None, "vocab_size": 20, "num_embeds_ada_norm": 10,
    "motion_max_seq_length": 4, "motion_norm_num_groups": 4, "multiple_of": 8,
}  # fmt: skip
# What diffusers leaves open and a denoiser needs all the same.
NEEDED = ("in_channels", "patch_size", "hidden_size", "num_kv_heads", "num_key_value_heads")


def configuration(kind: type, particular: dict[str, Any]) -> dict[str, Any]:
    """A tiny configuration of a class."""
    chosen: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        default = parameter.default
        if default is None and name not in NEEDED:
            continue
        if name in _ROPE:
            chosen[name] = {2: (8, 8), 3: (4, 4, 8), 4: (4, 4, 4, 4)}[len(default)]
        elif name in SIZES:
            chosen[name] = SIZES[name]
        elif default is None:
            chosen[name] = 2
    return {**chosen, **particular}


class Inputs:
    """Makes what a denoiser is called with; the numbers of an image depend on its seed alone.

    Attributes:
        config: of the denoiser.
        seeds: one for each image.
        t: timesteps `[n]`.
        latent: shape of the main input for one image.
    """

    def __init__(self, model: Any, seeds: list[int], t: Tensor) -> None:
        self.config, self.n = model.config, len(seeds)
        self.t = t.float().expand(self.n)
        self.latent = _latent(type(model), model.config)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators])

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.stack([torch.randint(high, shape, generator=g) for g in self._generators])

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(self.n, *shape)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(self.n, *shape)

    def ids(self, tokens: int) -> Tensor:
        """Positions of tokens for rotary embeddings, the same for all images."""
        axes = next((len(self.config[name]) for name in _ROPE if name in self.config), 3)
        return torch.stack([torch.arange(tokens).float() * (axis + 1) % 4 for axis in range(axes)], dim=1)

    def of(self, name: str) -> Any:
        """The argument of that name, None if the name says nothing."""
        if name in ("hidden_states", "sample"):
            return self.draw(*self.latent)
        if name.endswith(("timestep", "timesteps")) or name in ("t", "timestep_r", "timestep_ratio"):
            return self.t
        if name in ("encoder_hidden_states", "text_bth", "audio_encoder_hidden_states"):
            return self.draw(TEXT, WIDTH)
        if name in ("pooled_projections", "global_hidden_states", "pooled_embeds", "pooled_text_emb"):
            return self.draw(WIDTH)
        if name in ("encoder_attention_mask", "encoder_mask", "encoder_hidden_states_mask"):
            return self.ones(TEXT).bool()
        if name in ("img_ids", "txt_ids"):
            return self.ids(16) if name == "img_ids" else 0 * self.ids(TEXT)
        return {"original_size": 64 * self.ones(2), "target_size": 64 * self.ones(2), "crop_coords": self.zeros(2)}.get(
            name
        )


OPTIONAL = ("timestep", "timesteps", "encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids")


def _latent(kind: type, config: Any) -> tuple[int, ...]:
    channels = config.get("in_channels") or 4
    if "img_ids" in inspect.signature(kind.forward).parameters:
        return (16, channels)
    if "1D" in kind.__name__:
        return (channels, 16)
    is_video = any(word in kind.__name__ for word in ("3D", "Motion", "Video"))
    return (channels, 2, *GRID) if is_video else (channels, *GRID)


@dataclass
class Particular:
    """What the names of arguments do not tell of a class.

    Attributes:
        config: arguments of its constructor.
        inputs: of its forward; None leaves one out.
    """

    config: dict[str, Any]
    inputs: Callable[[Inputs], dict[str, Any]] = lambda m: {}


def _frames_first(m: Inputs) -> dict[str, Any]:
    return {"hidden_states": m.draw(2, 4, *GRID)}


def _tokens(m: Inputs, count: int = 16, width: int = 4) -> dict[str, Any]:
    return {"hidden_states": m.draw(count, width)}


def _shapes(m: Inputs) -> dict[str, Any]:
    return {"hidden_states": m.draw(16, 4), "img_shapes": [[(1, 4, 4)]] * m.n}


def _channels_last(channels: int, size: int = 8) -> Callable[[Inputs], dict[str, Any]]:
    return lambda m: {"hidden_states": m.draw(2, size, size, channels)}


def _cosmos3(m: Inputs) -> dict[str, Any]:
    """One sequence of all texts and then all images."""
    text, image = TEXT * m.n, 4 * m.n
    places = torch.arange(text, text + image)
    return {
        "input_ids": m.integers(20, TEXT).flatten(), "text_indexes": torch.arange(text), "und_len": text,
        "position_ids": torch.arange(text + image).expand(3, -1), "sequence_length": text + image,
        "vision_tokens": list(m.draw(1, 4, 1, 4, 4)), "vision_token_shapes": [(1, 2, 2)] * m.n,
        "vision_sequence_indexes": places, "vision_mse_loss_indexes": places,
        "vision_timesteps": m.t.repeat_interleave(4), "vision_noisy_frame_indexes": [torch.tensor([0])] * m.n,
    }  # fmt: skip


def _minimax_h3(m: Inputs) -> dict[str, Any]:
    """A sequence of text, video and audio, whose places all images share."""
    places = torch.arange(TEXT + 12)
    return {
        "hidden_states": m.draw(8, 16), "audio_hidden_states": m.draw(4, 4), "timestep": m.t[:1],
        "timestep_indices": 0 * places, "token_tags": (places >= TEXT).long() + (places >= TEXT + 8).long(),
        "position_ids": places[:, None].expand(-1, 3), "text_indices": places[:TEXT],
        "video_indices": places[TEXT : TEXT + 8], "audio_indices": places[TEXT + 8 :],
    }  # fmt: skip


def _protein(m: Inputs) -> dict[str, Any]:
    conditions = {"is_in_context_conditioning": m.zeros(6), "supports_local_latent": m.ones(6)}
    return {"bb_ca": m.draw(6, 3), "local_latents": m.draw(6, 4), "bb_ca_time": m.t / 1000,
            "local_latents_time": m.t / 1000, "padding_mask": m.ones(6).bool(), "conditioning": conditions}  # fmt: skip


def _ltx2(m: Inputs) -> dict[str, Any]:
    sizes = {"num_frames": 2, "height": 4, "width": 4, "audio_num_frames": 4}
    return {**_tokens(m, 32), "audio_hidden_states": m.draw(4, 4), "audio_timestep": m.t, **sizes}


_BLOCKS = {"block_out_channels": (8, 16), "attention_head_dim": 4}
_CONDITIONAL = {**_BLOCKS, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip


def _blocks(suffix: str) -> dict[str, Any]:
    return {"block_out_channels": (8, 16), "down_block_types": (f"CrossAttnDownBlock{suffix}", f"DownBlock{suffix}"),
            "up_block_types": (f"UpBlock{suffix}", f"CrossAttnUpBlock{suffix}")}  # fmt: skip


_LTX2 = {"caption_channels": 32, "cross_attention_dim": 32, "audio_cross_attention_dim": 32}
_FEATURES = ("xt_bb_ca", "xt_local_latents")
_TIMES = ("time_emb_bb_ca", "time_emb_local_latents")
PARTICULAR: dict[str, Particular] = {
    "AceStepTransformer1DModel": Particular(
        {"in_channels": 12, "audio_acoustic_hidden_dim": 4},
        lambda m: {**_tokens(m), "context_latents": m.draw(16, 8), "timestep_r": m.t / 2},
    ),
    "AnyFlowFARTransformer3DModel": Particular(
        {"chunk_partition": (1, 1)},
        lambda m: {**_frames_first(m), "chunk_partition": [1, 1], "timestep": m.t[:, None].expand(-1, 2),
                   "r_timestep": m.t[:, None].expand(-1, 2) / 2},
    ),
    "AnyFlowTransformer3DModel": Particular(
        {},
        lambda m: {**_frames_first(m), "timestep": m.t[:, None].expand(-1, 2),
                   "r_timestep": m.t[:, None].expand(-1, 2) / 2},
    ),
    "BriaFibo2Transformer2DModel": Particular(
        {"injection_layer_ids": (0, 1), "min_num_gist_tokens": 2, "max_num_gist_tokens": 4, "gist_step": 1,
         "gist_min_text_len": 2, "gist_max_text_len": 8, "axes_lens": (32, 32, 32)},
        lambda m: {"encoder_hidden_states": m.draw(3, TEXT, WIDTH)},
    ),
    "BriaFiboTransformer2DModel": Particular(
        {"text_encoder_dim": 16}, lambda m: {"text_encoder_layers": [m.draw(TEXT, 16) for _ in range(3)]}
    ),
    "CogVideoXTransformer3DModel": Particular({}, _frames_first),
    "ConsisIDTransformer3DModel": Particular({}, _frames_first),
    "Cosmos3OmniTransformer": Particular({"patch_latent_dim": 16, "rope_axes_dim": (4, 2, 2)}, _cosmos3),
    "CosmosTransformer3DModel": Particular(
        {"max_size": (4, 8, 8), "concat_padding_mask": False}
    ),
    "DiTTransformer2DModel": Particular({"out_channels": 8}, lambda m: {"class_labels": m.integers(10)}),
    "DreamLiteUNetModel": Particular(
        {"block_out_channels": (8, 8, 16), "attention_head_dim": 4},
    ),
    "EasyAnimateTransformer3DModel": Particular({"mmdit_layers": 1, "out_channels": 4}),
    "ErnieImageTransformer2DModel": Particular({}, lambda m: {"text_lens": TEXT * m.ones().long()}),
    "GlmImageTransformer2DModel": Particular(
        {"prior_vq_quantizer_codebook_size": 10},
        lambda m: {"prior_token_id": m.integers(10, 16), "prior_token_drop": m.zeros(16).bool()},
    ),
    "HiDreamImageTransformer2DModel": Particular(
        {"caption_channels": [32, 32], "llama_layers": [0, 1, 0], "max_resolution": (8, 8),
         "axes_dims_rope": (4, 4, 8)},
        lambda m: {"hidden_states": m.draw(4, *GRID), "img_ids": None, "encoder_hidden_states_t5": m.draw(TEXT, WIDTH),
                   "encoder_hidden_states_llama3": torch.stack([m.draw(TEXT, WIDTH) for _ in range(2)]),
                   "pooled_embeds": m.draw(WIDTH)},
    ),
    "HunyuanDiT2DModel": Particular(
        {"hidden_size": 32, "num_layers": 4, "cross_attention_dim_t5": 16},
        lambda m: {"text_embedding_mask": m.ones(TEXT), "encoder_hidden_states_t5": m.draw(TEXT, 16),
                   "text_embedding_mask_t5": m.ones(TEXT), "image_meta_size": m.ones(6), "style": m.zeros().long(),
                   "image_rotary_emb": (torch.ones(16, 16), torch.zeros(16, 16))},
    ),
    "HunyuanVideo15Transformer3DModel": Particular(
        {},
        lambda m: {"encoder_hidden_states_2": m.draw(TEXT, WIDTH), "encoder_attention_mask_2": m.ones(TEXT).bool(),
                   "image_embeds": m.draw(TEXT, WIDTH)},
    ),
    "HunyuanVideoFramepackTransformer3DModel": Particular(
        {"has_image_proj": True, "has_clean_x_embedder": True},
        lambda m: {"image_embeds": m.draw(TEXT, WIDTH), "indices_latents": torch.arange(2),
                   "latents_clean": m.draw(4, 2, *GRID), "indices_latents_clean": torch.arange(2),
                   "latents_history_2x": m.draw(4, 2, *GRID), "indices_latents_history_2x": torch.arange(2),
                   "latents_history_4x": m.draw(4, 4, *GRID), "indices_latents_history_4x": torch.arange(4),
                   "guidance": m.ones()},
    ),
    "HunyuanVideoTransformer3DModel": Particular({}, lambda m: {"guidance": m.ones()}),
    "I2VGenXLUNet": Particular(
        {**_blocks("3D"), "attention_head_dim": 4},
        lambda m: {"sample": m.draw(4, 2, *GRID), "fps": 8 * m.ones(), "image_latents": m.draw(4, 2, *GRID),
                   "image_embeddings": m.draw(WIDTH)},
    ),
    "Ideogram4Transformer2DModel": Particular(
        {"mrope_section": (4, 2, 2)},
        lambda m: {"hidden_states": m.draw(16, 4), "encoder_hidden_states": m.draw(16, WIDTH),
                   "position_ids": torch.arange(16)[None, :, None].expand(m.n, -1, 3),
                   "segment_ids": m.ones(16).long(),
                   "indicator": torch.tensor([3] * 6 + [2] * 10).expand(m.n, -1), "timestep": m.t / 1000},
    ),
    "JoyImageEditPlusTransformer3DModel": Particular(
        {}, lambda m: {"hidden_states": m.draw(16, 4, 1, 2, 2), "shape_list": [[(1, 4, 4)]] * m.n}
    ),
    "Kandinsky3UNet": Particular(
        {"block_out_channels": (8, 16), "attention_head_dim": 4, "layers_per_block": 2},
        lambda m: {"encoder_attention_mask": m.ones(TEXT)},
    ),
    "Kandinsky5Transformer3DModel": Particular(
        {},
        lambda m: {**_channels_last(4)(m), "visual_rope_pos": [torch.arange(k) for k in (2, 4, 4)],
                   "text_rope_pos": torch.arange(TEXT)},
    ),
    "Kandinsky6SRTransformer3DModel": Particular({"nabla_window": (3, 3, 3)}, _channels_last(9)),
    "Kandinsky6Transformer3DModel": Particular(
        {}, lambda m: {**_channels_last(9)(m), "audio_hidden_states": m.draw(4, 4)}
    ),
    "Krea2Transformer2DModel": Particular(
        {"num_text_layers": 3},
        lambda m: {**_tokens(m), "encoder_hidden_states": m.draw(TEXT, 3, WIDTH), "position_ids": m.ids(TEXT + 16)},
    ),
    "LTX2VideoTransformer3DModel": Particular(_LTX2, _ltx2),
    "LTXVideoTransformer3DModel": Particular(
        {}, lambda m: {**_tokens(m, 32), "num_frames": 2, "height": 4, "width": 4}
    ),
    "LatteTransformer3DModel": Particular(
        {"caption_channels": WIDTH, "norm_type": "ada_norm_single", "num_embeds_ada_norm": 10}
    ),
    "LongCatAudioDiTTransformer": Particular({}, _tokens),
    "LuminaNextDiT2DModel": Particular(
        {}, lambda m: {"image_rotary_emb": torch.ones(8, 8, 8).to(torch.complex64), "cross_attention_kwargs": {}}
    ),
    "MiniMaxH3Transformer3DModel": Particular({"rope_freq_dim": 2}, _minimax_h3),
    "MiniMaxMusic3Transformer1DModel": Particular(
        {"rotary_dim": 8}, lambda m: {"encoder_hidden_states": m.draw(16, WIDTH), "timestep": m.t / 1000}
    ),
    "NucleusMoEImageTransformer2DModel": Particular(
        {"num_experts": 4, "in_channels": 4, "num_layers": 5, "capacity_factors": [2.0] * 5, "mlp_ratio": 12.0},
        lambda m: {**_shapes(m), "img_shapes": [(1, 4, 4)] * m.n},
    ),
    "OmniGenTransformer2DModel": Particular(
        {"pad_token_id": 0, "max_position_embeddings": 64, "original_max_position_embeddings": 64,
         "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}},
        lambda m: {"input_ids": m.integers(20, TEXT), "input_img_latents": [], "input_image_sizes": {},
                   "attention_mask": m.ones(TEXT + 17, TEXT + 17),
                   "position_ids": torch.arange(TEXT + 17).expand(m.n, -1)},
    ),
    "PRXTransformer2DModel": Particular({"axes_dim": (8, 8)}),
    "PriorTransformer": Particular(
        {"num_embeddings": TEXT}, lambda m: {"hidden_states": m.draw(WIDTH), "proj_embedding": m.draw(WIDTH)}
    ),
    "QwenImage21Transformer2DModel": Particular(
        {},
        lambda m: {**_shapes(m), "img_mask": torch.tensor([False] * TEXT + [True] * 4).expand(m.n, -1)},
    ),
    "QwenImageTransformer2DModel": Particular({}, _shapes),
    "RFD4ProteinaTransformer": Particular(
        {"feats_seq": _FEATURES, "feats_cond_seq": _TIMES, "feats_pair_repr": ("xt_bb_ca_pair_dists",),
         "feats_pair_cond": _TIMES, "tri_mult_c": 16, "t_emb_dim": 16},
        _protein,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Particular(
        _LTX2, lambda m: {**_tokens(m, 32), "video_rotary_emb": (torch.ones(1, 32, 32), torch.zeros(1, 32, 32))}
    ),
    "SanaWMTransformer3DModel": Particular(
        {}, lambda m: {"encoder_attention_mask": m.ones(TEXT), "timestep": m.t[:, None, None].expand(-1, 1, 2)}
    ),
    "StableAudio3DiTModel": Particular(
        {"local_add_cond_dim": 5},
        lambda m: {"hidden_states": m.draw(4, 16), "local_add_cond": m.draw(5, 16)},
    ),
    "StableAudioDiTModel": Particular(
        {"num_key_value_attention_heads": 1},
        lambda m: {"hidden_states": m.draw(4, 16), "global_hidden_states": m.draw(1, WIDTH),
                   "rotary_embedding": (torch.ones(17, 8), torch.zeros(17, 8))},
    ),
    "StableCascadeUNet": Particular(
        {"block_out_channels": (16, 16), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
         "up_num_layers_per_block": (1, 1), "clip_seq": 2, "self_attn": (True, True)},
        lambda m: {"clip_text_pooled": m.draw(1, WIDTH), "timestep_ratio": m.t / 1000},
    ),
    "T5FilmDecoder": Particular(
        {"input_dims": 4, "targets_length": 8, "d_kv": 16, "d_ff": 32},
        lambda m: {"encodings_and_masks": [(m.draw(TEXT, WIDTH), m.ones(TEXT))],
                   "decoder_input_tokens": m.draw(8, 4), "decoder_noise_time": m.t / 1000},
    ),
    "Transformer2DModel": Particular({"in_channels": 8, "patch_size": None, "cross_attention_dim": WIDTH}),
    "TransformerTemporalModel": Particular(
        {},
        lambda m: {"hidden_states": m.draw(2, 4, *GRID).flatten(0, 1), "encoder_hidden_states": None, "num_frames": 2},
    ),
    "UNet1DModel": Particular(
        {"in_channels": 2, "out_channels": 2, "extra_in_channels": 64, "sample_size": 32,
         "block_out_channels": (32, 32), "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"),
         "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip"), "layers_per_block": 1},
        lambda m: {"sample": m.draw(2, 32)},
    ),
    "UNet2DConditionModel": Particular(_CONDITIONAL),
    "UNet2DModel": Particular(
        {**_BLOCKS, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    ),
    "UNet3DConditionModel": Particular({**_blocks("3D"), "attention_head_dim": 4}),
    "UNetMotionModel": Particular(
        {**_blocks("Motion"), "num_attention_heads": 2},
        lambda m: {"encoder_hidden_states": m.draw(2, TEXT, WIDTH).flatten(0, 1)},
    ),
    "UNetSpatioTemporalConditionModel": Particular(
        {**_blocks("SpatioTemporal"), "block_out_channels": (32, 64), "num_attention_heads": (1, 2),
         "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24},
        lambda m: {"sample": m.draw(2, 4, *GRID), "added_time_ids": m.ones(3)},
    ),
    "UVit2DModel": Particular(
        {"codebook_size": 16, "vocab_size": 17, "block_out_channels": 32, "in_channels": 32,
         "micro_cond_embed_dim": 160},
        lambda m: {"input_ids": m.integers(17, 8, 8), "micro_conds": m.ones(5)},
    ),
    "WanAnimate2Transformer3DModel": Particular(
        {"in_dim": 8, "out_dim": 4, "use_img_emb": False},
        lambda m: {"hidden_states": list(m.draw(4, 2, *GRID)), "encoder_hidden_states": list(m.draw(TEXT, WIDTH)),
                   "condition_latents": list(m.draw(4, 2, *GRID)), "kv_cache": WanAnimate2KVCache(2), "seq_len": 32,
                   "kv_cache_mode": "extract", "offset_grid_sizes": torch.tensor([[2, 4, 4]] * m.n)},
    ),
    "WanAnimateTransformer3DModel": Particular(
        {"in_channels": 12, "latent_channels": 4, "image_dim": 16,
         "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16, "motion_style_dim": 8,
         "motion_dim": 4, "motion_encoder_dim": 8,
         "face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1},
        lambda m: {"pose_hidden_states": m.draw(4, 1, *GRID), "encoder_hidden_states_image": m.draw(3, 16),
                   "face_pixel_values": m.draw(3, 4, 16, 16)},
    ),
    "WanVACETransformer3DModel": Particular(
        {"vace_layers": [0], "vace_in_channels": 8}, lambda m: {"control_hidden_states": m.draw(8, 2, *GRID)}
    ),
    "ZImageTransformer2DModel": Particular(
        {"axes_lens": (64, 32, 32)},
        lambda m: {"x": list(m.draw(4, 1, *GRID)), "cap_feats": list(m.draw(TEXT, WIDTH)), "t": m.t / 1000},
    ),
}  # fmt: skip


def inputs_of(model: Any, seeds: list[int], t: Tensor) -> dict[str, Any]:
    """Arguments of a call."""
    kind, make = type(model), Inputs(model, seeds, t)
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.forward).parameters.items():
        if parameter.default is parameter.empty or name in OPTIONAL:
            found[name] = make.of(name)
    if kind.__name__ in PARTICULAR:
        found |= PARTICULAR[kind.__name__].inputs(make)
    return {name: value for name, value in found.items() if value is not None}


def denoisers() -> dict[str, type]:
    """The denoiser classes of diffusers by name."""
    found: dict[str, type] = {}
    for package in (transformers, unets):
        for entry in iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{entry.name}")
            for name, kind in vars(module).items():
                if inspect.isclass(kind) and issubclass(kind, ModelMixin) and kind.__module__ == module.__name__:
                    found[name] = kind
    return {name: found[name] for name in sorted(found) if name not in HELPERS}


def make(kind: type) -> nn.Module:
    """A tiny denoiser with random weights; gates that start at zero would hide what lies behind them."""
    particular = PARTICULAR.get(kind.__name__, Particular({}))
    torch.manual_seed(0)
    model = kind(**configuration(kind, particular.config)).float().eval()
    for parameter in model.parameters():
        if not parameter.isfinite().all() or not parameter.any() or parameter.abs().max() > 100:
            nn.init.normal_(parameter, std=0.02)
    return model
