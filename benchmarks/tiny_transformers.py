"""Tiny models of transformers, made from their config classes, and inputs for them.

An argument of a config whose name says that it is a width, a depth, a vocabulary or a number of heads is made small, in
nested configs too. Tuples become lists, as in a config that was saved and loaded: some classes add lists to them. The
inputs follow from the signature of the forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
WIDTH, HEADS, LAYERS, VOCABULARY, LENGTH = 64, 4, 2, 300, 16
# Arguments of configs by name, with the value that makes them tiny; larger defaults only are replaced.
SIZES = {
    **dict.fromkeys(
        "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size encoder_hidden_dim decoder_hidden_size "
        "projection_dim encoder_hidden_size out_hidden_size text_hidden_size image_text_hidden_size "
        "conv_dim_out lstm_hidden_size hidden_dim_text classifier_proj_size fusion_hidden_size "
        "fpn_hidden_size mask_feature_size feature_size decoder_dim lru_width output_channels".split(),
        WIDTH,
    ),
    **dict.fromkeys(
        "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff d_inner n_inner moe_intermediate_size "
        "shared_expert_intermediate_size decoder_intermediate_size encoder_feedforward_dim dim_feedforward "
        "expert_dim mlp_dim ffn_hidden_size hidden_dim shared_intermediate_size intermediate_size_mlp".split(),
        2 * WIDTH,
    ),
    **dict.fromkeys(
        "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads "
        "encoder_num_attention_heads decoder_num_attention_heads linear_num_value_heads "
        "num_attention_heads_text".split(),
        HEADS,
    ),
    **dict.fromkeys("num_key_value_heads num_kv_heads linear_num_key_heads multi_query_group_num".split(), 2),
    **dict.fromkeys(
        "head_dim d_kv d_head v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim kv_channels "
        "attention_head_dim rotary_dim".split(),
        WIDTH // HEADS,
    ),
    **dict.fromkeys("qk_rope_head_dim index_head_dim".split(), 8),
    **dict.fromkeys("q_lora_rank kv_lora_rank dt_rank".split(), 32),
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers decoder_num_hidden_layers encoder_num_hidden_layers speech_encoder_layers "
        "t2u_encoder_layers t2u_decoder_layers decoder_depth num_block_layers l_layers x_layers r_layers".split(),
        LAYERS,
    ),
    **dict.fromkeys("vocab_size t2u_vocab_size unit_hifi_gan_vocab_size text_vocab_size".split(), VOCABULARY),
    **dict.fromkeys("vocab_size_per_layer_input entity_vocab_size num_codevectors_per_group".split(), VOCABULARY),
    **dict.fromkeys("max_position_embeddings n_positions max_source_positions max_target_positions".split(), 128),
    **dict.fromkeys("num_experts n_routed_experts num_local_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_k experts_per_token topk_group n_group".split(), 2),
    **dict.fromkeys("image_size pretrain_image_size max_img_size".split(), 64),
    **dict.fromkeys("sliding_window local_attention attention_window sliding_window_size".split(), 8),
    **dict.fromkeys("num_queries num_query_tokens".split(), 8),
    "codebook_size": 256,
    "hidden_size_per_layer_input": 16,
    "query_pre_attn_scalar": 16,
    "expert_capacity": 8,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "local_transformer_stride": 16,
    "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0,
    "block_size": 4,
    "num_random_blocks": 1,
    "context_length": 32,
    "prediction_length": 8,
}
PER_STAGE = ("depths", "layer_depths", "num_blocks", "blocks_per_stage", "layers_per_stage")
# By model type, arguments whose names do not tell; mostly so many layers that a hybrid model has all of its kinds.
OVERRIDES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"num_hidden_layers": 4},
    "olmo_hybrid": {"num_hidden_layers": 4},
    "kimi_linear": {"num_hidden_layers": 4, "linear_num_heads": HEADS, "linear_head_dim": WIDTH // HEADS},
    "gemma3n_text": {"num_hidden_layers": 5},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "swinv2": {"window_size": 4},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "reformer": {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [32, 32], "num_buckets": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 2 * WIDTH, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 1, "position_embedding_type": "rotary"},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"num_key_value_heads": HEADS},
    "ministral": {"head_dim": WIDTH // HEADS},
    "swin": {"embed_dim": 48, "window_size": 2},
    "donut-swin": {"embed_dim": 48, "window_size": 2},
    "nemotron": {"num_key_value_heads": 2, "head_dim": WIDTH // HEADS},
    "perceiver": {"d_latents": WIDTH, "num_latents": 16, "num_self_attends_per_block": 2},
    "vits": {
        "vocab_size": VOCABULARY,
        "upsample_initial_channel": WIDTH,
        "upsample_rates": [4, 4],
        "upsample_kernel_sizes": [8, 8],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
    },
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "autoformer": {"prediction_length": 8, "context_length": 32},
    "informer": {"prediction_length": 8, "context_length": 32},
    "time_series_transformer": {"prediction_length": 8, "context_length": 32},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3": {"num_key_value_heads": HEADS, "n_group": 2, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "fastspeech2_conformer": {"vocab_size": VOCABULARY},
    "beit": {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]},
    "data2vec-vision": {"num_hidden_layers": 4, "out_indices": [2, 3, 4, 5]},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "clap": {
        "audio_config": {"patch_embeds_hidden_size": 32, "hidden_size": 256, "num_attention_heads": [2, 4, 8, 16]},
    },
    "oneformer": {
        "backbone_config": {
            "model_type": "swin",
            "embed_dim": 48,
            "depths": [1, 1, 1, 1],
            "window_size": 2,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "conv_dim": WIDTH,
        "mask_dim": WIDTH,
        "hidden_dim": WIDTH,
    },
    "sam": {"vision_config": {"num_pos_feats": WIDTH // 2}},
    "sapiens2": {"head_config": {"upsample_out_channels": [32, 32], "conv_out_channels": [32]}},
    "seggpt": {
        "image_size": [128, 64],
        "num_hidden_layers": 4,
        "intermediate_hidden_state_indices": [0, 1, 2, 3],
        "merge_index": 0,
    },
    "speecht5": {"vocab_size": VOCABULARY},
    "tvp": {"num_frames": 2, "visual_prompt_size": 8},
    "vitmatte": {
        "backbone_config": {
            "model_type": "vitdet",
            "num_channels": 4,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "image_size": 64,
            "out_features": ["stage2"],
        },
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": WIDTH // HEADS},
    "hunyuan_v1_moe": {"head_dim": WIDTH // HEADS},
    "recurrent_gemma": {"num_hidden_layers": 3},
}


# Model types that take one example at a time: tvp gives its columns positions for one video.
SINGLE = {"tvp"}


def models(name: str) -> Iterator[Callable[[], nn.Module]]:
    """Yields two ways to make the model "type/class": with small widths, and with the default ones."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, class_name = name.split("/")
    cls = getattr(transformers, class_name)
    config_class = cls.config_class or CONFIG_MAPPING[kind]  # some classes take a part of their type's config
    for widths in (True, False):

        def make(widths: bool = widths) -> nn.Module:
            config = tiny_config(config_class, OVERRIDES.get(kind, {}), widths)
            config.use_cache = False
            if getattr(config, "prediction_length", 0) is None:
                config.prediction_length = 8
            if getattr(config, "vocab_size", VOCABULARY) is None:
                config.vocab_size = VOCABULARY
            if getattr(config, "pad_token_id", None) is None:
                config.pad_token_id = 0
            if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
                config.decoder_start_token_id = 0
            _check_size(cls, config)
            return cls(config)

        yield make


def _check_size(cls: type, config: Any) -> None:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > 100e6:
        raise ValueError(f"{size / 1e6:.0f} M parameters are too many")


def tiny_config(config_class: type, overrides: dict[str, Any], widths: bool) -> Any:
    """The config with small sizes, for arguments known by name; with the default widths unless `widths`."""
    keep = () if widths else (WIDTH, 2 * WIDTH, HEADS, WIDTH // HEADS, 8, 32)
    values: dict[str, Any] = {}
    token = VOCABULARY - 1
    for name, parameter in inspect.signature(config_class.__init__).parameters.items():
        default = parameter.default
        if name.endswith(("_token_id", "_token_index")) and isinstance(default, int | list | tuple):
            first = default if isinstance(default, int) else default[0]
            if first >= VOCABULARY // 2:
                values[name], token = token, token - 1
        elif isinstance(default, bool):
            continue
        elif name in PER_STAGE and isinstance(default, list | tuple):
            values[name] = [min(depth, 1) if isinstance(depth, int) else depth for depth in default]
        elif name in SIZES and isinstance(default, int) and default > SIZES[name] and SIZES[name] not in keep:
            values[name] = SIZES[name]
        elif name in SIZES and name.endswith("_size") and isinstance(default, list | tuple) and "image" in name:
            values[name] = [min(side, SIZES[name]) for side in default]
        elif isinstance(default, tuple):
            values[name] = _lists(default)
    values |= overrides
    for name, sub in getattr(config_class, "sub_configs", {}).items():
        if hasattr(sub, "model_type") and hasattr(sub, "sub_configs") and sub.__name__ != "AutoConfig":
            values[name] = tiny_config(sub, overrides.get(name, {}), widths).to_dict()
    return config_class(**values)


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


class Random:
    """Random inputs from seed 0."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def tokens(self, *shape: int) -> Tensor:
        return torch.randint(10, VOCABULARY // 2, shape, generator=self.generator)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def _patches(config: Any, random: Random) -> Tensor:
    """The 16 patches of an image, each with its row and its column in front."""
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).expand(2, 16, 2)
    return torch.cat([places, random.noise(2, 16, config.vision_config.patch_embed_hidden_size)], dim=-1)


# Arguments that a model needs beside the usual ones, by name.
BESIDE: dict[str, Callable[[Any, Random], Tensor]] = {
    "visual_feats": lambda config, random: random.noise(2, 6, config.visual_feat_dim),
    "visual_pos": lambda config, random: random.noise(2, 6, config.visual_pos_dim).sigmoid(),
    "task_inputs": lambda config, random: random.tokens(2, config.task_seq_len),
    "states": lambda config, random: random.noise(2, LENGTH, config.state_dim),
    "actions": lambda config, random: random.noise(2, LENGTH, config.act_dim),
    "rewards": lambda config, random: random.noise(2, LENGTH, 1),
    "returns_to_go": lambda config, random: random.noise(2, LENGTH, 1),
    "timesteps": lambda config, random: torch.arange(LENGTH).expand(2, LENGTH),
    "flattened_patches": _patches,
    "past_values_padding": lambda config, random: torch.zeros(2, config.context_length, dtype=torch.long),
    "freq": lambda config, random: torch.zeros(2, 1, dtype=torch.long),
    # Two frames for each token.
    "spectrogram_labels": lambda config, random: random.noise(2, 2 * LENGTH, config.num_mel_bins),
    "duration_labels": lambda config, random: torch.full((2, LENGTH), 2),
    "pitch_labels": lambda config, random: random.noise(2, LENGTH, 1),
    "energy_labels": lambda config, random: random.noise(2, LENGTH, 1),
}


def candidate_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Keyword arguments that the model may take, the likeliest first."""
    random = Random()
    names = inspect.signature(model.forward).parameters
    beside = {name: make(model.config, random) for name, make in BESIDE.items() if name in names}
    for inputs in _usual_inputs(model, names, random):
        inputs = {**inputs, **beside}
        yield {name: value[:1] for name, value in inputs.items()} if model.config.model_type in SINGLE else inputs


def _usual_inputs(model: nn.Module, names: Mapping[str, inspect.Parameter], random: Random) -> Iterator[Inputs]:
    config, tokens, noise = model.config, random.tokens, random.noise
    text: Inputs = {}
    if "input_ids" in names:
        choices = (2,) if "MultipleChoice" in type(model).__name__ else ()
        codebooks = getattr(config, "num_codebooks", 1)  # each text has a row for each codebook
        text["input_ids"] = tokens(2 * codebooks, *choices, LENGTH)
        if isinstance(getattr(config, "eos_token_id", None), int):
            text["input_ids"][..., -1] = config.eos_token_id
        if "attention_mask" in names:
            text["attention_mask"] = torch.ones_like(text["input_ids"][::codebooks])
        if "bbox" in names:
            text["bbox"] = torch.tensor([1, 2, 5, 8]).expand(*text["input_ids"].shape, 4).clone()
    decoder: Inputs = {"decoder_input_ids": tokens(2, 8)} if "decoder_input_ids" in names else {}
    if "pixel_values" in names:
        channels, sizes = _images(config)
        frames = (getattr(config, "num_frames", 8),) if "ideo" in str(names["pixel_values"]) else ()
        for size in sizes:
            for shape in ((2, *frames, channels, *size), (2, getattr(config, "num_frames", 8), channels, *size)):
                image = {"pixel_values": noise(*shape)}
                image |= {name: noise(*shape) for name in ("prompt_pixel_values", "prompt_masks") if name in names}
                if "pixel_mask" in names:
                    image["pixel_mask"] = torch.ones(2, *size, dtype=torch.long)
                yield {**image, **decoder}
                if text:
                    yield {**text, **image, **decoder}
    for audio in ("input_values", "input_features"):
        if audio in names:
            bins = _bins(config)
            for shape in ((2, 4000), (2, 1, 4000), (2, 100, bins), (2, bins, 256), (2, bins, 100), (2, 1024, bins)):
                for mask in ({}, {"attention_mask": torch.ones(2, shape[1], dtype=torch.long)}):
                    yield {audio: noise(*shape), **mask, **decoder}
            if text:
                yield {**text, audio: noise(2, 1, 256, bins)}
            if "decoder_input_values" in names:  # encoder and decoder alone, without the layers before them
                hidden = config.hidden_size
                yield {audio: noise(2, 100, hidden), "decoder_input_values": noise(2, 8, hidden)}
    if "past_values" in names:
        length = getattr(config, "context_length", 32)
        channels = getattr(config, "num_input_channels", 1)
        yield {"past_values": noise(2, length, channels)}
        yield {"past_values": noise(2, length)}
        past = length + max(getattr(config, "lags_sequence", [0]))
        future = getattr(config, "prediction_length", None) or 8
        yield {
            "past_values": noise(2, past),
            "past_time_features": noise(2, past, getattr(config, "num_time_features", 0)),
            "past_observed_mask": torch.ones(2, past),
            "future_values": noise(2, future),
            "future_time_features": noise(2, future, getattr(config, "num_time_features", 0)),
        }
    if "inputs" in names:
        yield {"inputs": tokens(2, LENGTH)}
        yield {"inputs": noise(2, LENGTH, config.d_model)}
    if text:
        yield {**text, **decoder}
        yield {"input_ids": text["input_ids"]}
    yield decoder


def _bins(config: Any) -> int:
    """The number of features that audio has at each time."""
    configs = [config, getattr(config, "audio_config", None)]
    names = ("feature_projection_input_dim", "num_mel_bins", "feature_size")
    return next((getattr(c, name) for c in configs for name in names if hasattr(c, name)), 80)


def _images(config: Any) -> tuple[int, list[tuple[int, int]]]:
    """The number of channels, and the sizes of images to try."""
    configs = [config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config", "encoder"))]
    channels = next((c.num_channels for c in configs if hasattr(c, "num_channels")), 3)
    sizes = [c.image_size for c in configs if getattr(c, "image_size", None)]
    pairs = [(size, size) if isinstance(size, int) else tuple(size)[-2:] for size in sizes]
    return channels, [*dict.fromkeys([(64, 64), *pairs, (128, 128), (224, 224)])]
