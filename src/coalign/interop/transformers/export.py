"""Two-tower models in the format of Hugging Face transformers (extra "hf"): a CLIPModel and its image processor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coalign.errors import UserError
from coalign.networks.open_clip_parts import VisionTransformer
from coalign.networks.towers.image import ImageTower
from coalign.networks.towers.text import TextTower
from coalign.networks.transformer import is_plain
from coalign.types import Preprocess


def to_transformers(image: ImageTower, text: TextTower, log_logit_scale: Tensor, start_id: int, end_id: int) -> Any:
    """Returns a transformers.CLIPModel. Raises UserError for towers that it cannot represent."""
    from transformers import CLIPConfig, CLIPModel

    _check_towers(image, text)
    vision: Any = image.trunk
    vision_blocks = vision.transformer.resblocks
    config = CLIPConfig(
        vision_config={
            **_shape(vision_blocks),
            "image_size": image.image_size,
            "patch_size": vision.conv1.kernel_size[0],
            "projection_dim": image.embed_dim,
        },
        text_config=text_config(text, start_id, end_id),
        projection_dim=image.embed_dim,
    )
    state = {
        "logit_scale": log_logit_scale.reshape(()),
        "visual_projection.weight": image.projection.get_parameter("weight"),
        "vision_model.embeddings.class_embedding": vision.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": vision.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": vision.positional_embedding,
        **_norm("vision_model.pre_layrnorm", vision.ln_pre),  # the library's spelling
        **_norm("vision_model.post_layernorm", vision.ln_post),
        **_layers("vision_model", vision_blocks),
        **text_state(text),
    }
    model = CLIPModel(config).eval()
    expected = {name for name in model.state_dict() if not name.endswith("position_ids")}
    model.load_state_dict({name: value.detach().cpu() for name, value in state.items()}, strict=False)
    if expected != set(state):
        mismatched = ", ".join(sorted(expected ^ set(state))[:3])
        raise UserError(f"The installed transformers has a CLIPModel with different weights: {mismatched}.")
    return model


def text_config(text: TextTower, start_id: int, end_id: int) -> dict[str, Any]:
    """Returns the settings of a CLIPTextConfig."""
    return {
        **_shape(text.transformer.transformer.resblocks),
        "vocab_size": text.transformer.token_embedding.num_embeddings,
        "max_position_embeddings": text.context_length,
        "bos_token_id": start_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
        "projection_dim": text.embed_dim,
    }


def text_state(text: TextTower) -> dict[str, Tensor]:
    """Returns the weights of a text encoder and its projection by the names of transformers."""
    transformer = text.transformer
    return {
        "text_projection.weight": text.projection.get_parameter("weight"),
        "text_model.embeddings.token_embedding.weight": transformer.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": transformer.positional_embedding,
        **_norm("text_model.final_layer_norm", transformer.ln_final),
        **_layers("text_model", transformer.transformer.resblocks),
    }


def from_clip_model(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Converts a CLIPModel to open_clip's model_cfg and a state_dict of its CustomTextCLIP.

    Raises UserError for a model that open_clip cannot represent.
    """
    vision, text = model.config.vision_config, model.config.text_config
    shared = {name: {getattr(part, name) for part in (vision, text)} for name in ("hidden_act", "layer_norm_eps")}
    if any(len(values) > 1 for values in shared.values()) or shared["layer_norm_eps"] != {1e-5}:
        settings = ", ".join(f"{name} {' and '.join(sorted(map(str, values)))}" for name, values in shared.items())
        raise UserError(
            f"open_clip cannot represent this CLIPModel: its towers have {settings}, but must share hidden_act, and layer_norm_eps 1e-05."
        )
    (activation,) = shared["hidden_act"]
    if activation not in ("gelu", "quick_gelu"):
        raise UserError(
            f"open_clip cannot represent this CLIPModel: its activation is {activation}, but must be gelu or quick_gelu."
        )
    config = {
        "embed_dim": model.config.projection_dim,
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }
    return config, _open_clip_state(model)


def _open_clip_state(model: Any) -> dict[str, Tensor]:
    source = model.state_dict()
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "text.ln_final": "text_model.final_layer_norm",
    }
    state = {new: source[old] for new, old in names.items()}
    state |= {f"{new}.{kind}": source[f"{old}.{kind}"] for new, old in norms.items() for kind in ("weight", "bias")}
    state |= {
        "logit_scale": source["logit_scale"],
        "visual.proj": source["visual_projection.weight"].T,
        "text.text_projection": source["text_projection.weight"].T,
    }
    for new_tower, old_tower, num_layers in (
        ("visual", "vision_model", model.config.vision_config.num_hidden_layers),
        ("text", "text_model", model.config.text_config.num_hidden_layers),
    ):
        for number in range(num_layers):
            block, layer = f"{new_tower}.transformer.resblocks.{number}", f"{old_tower}.encoder.layers.{number}"
            for kind in ("weight", "bias"):
                qkv = [source[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                state[f"{block}.attn.in_proj_{kind}"] = torch.cat(qkv)
                for new, old in _BLOCK.items():
                    state[f"{block}.{new}.{kind}"] = source[f"{layer}.{old}.{kind}"]
    return {key: value.detach().float().clone().contiguous() for key, value in state.items()}


_BLOCK = {  # open_clip's names in a block -> transformers' names in a layer
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def preprocessor(size: int, preprocess: Preprocess) -> dict[str, Any]:
    """Returns the content of preprocessor_config.json for the evaluation view; transformers also resizes with Pillow. Raises UserError if
    transformers cannot represent it."""
    if preprocess.resize_mode == "longest":
        raise UserError("transformers' CLIPImageProcessor cannot pad images to a square; use --to open_clip or onnx.")
    square, crops = {"height": size, "width": size}, preprocess.resize_mode == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if crops else square,
        "resample": _RESAMPLE[preprocess.interpolation],
        "do_center_crop": crops,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def read_preprocessor(processor: Any) -> Preprocess:
    """Returns the preprocessing of an image processor of transformers."""
    return Preprocess(
        tuple(processor.image_mean),
        tuple(processor.image_std),
        "bilinear" if int(processor.resample) == _RESAMPLE["bilinear"] else "bicubic",
        "shortest" if getattr(processor, "do_center_crop", False) else "squash",
    )


def _check_towers(image: ImageTower, text: TextTower) -> None:
    trunk = image.trunk
    if not isinstance(trunk, VisionTransformer) or not is_plain(trunk.transformer):
        raise UserError(
            "transformers cannot represent this image tower, which is neither a plain ViT nor a model of timm; export the model to "
            "open_clip, or train a plain ViT, such as ViT-S-32."
        )
    is_clip_vit = trunk.pool_type == "tok" and trunk.attn_pool is None and isinstance(trunk.ln_pre, nn.LayerNorm)
    if not is_clip_vit or trunk.final_ln_after_pool is True or _has_layer_scale(trunk):
        raise UserError("CLIPModel cannot represent this ViT, whose pooling or normalization differs from CLIP's.")
    check_text_tower(text, "CLIPModel")


def check_text_tower(text: TextTower, model: str) -> None:
    """Raises UserError for a text encoder that is not CLIP's. `model`: the class that cannot represent it."""
    if text.attention != "causal" or text.pooling != "end" or _has_layer_scale(text.transformer):
        raise UserError(
            f"{model} cannot represent this text tower, whose attention is bidirectional or whose pooling differs from CLIP's."
        )


def _has_layer_scale(tower: Any) -> bool:
    return not all(isinstance(block.ls_1, nn.Identity) for block in tower.transformer.resblocks)


def _shape(blocks: Any) -> dict[str, Any]:
    block = blocks[0]
    return {
        "hidden_size": block.attn.out_proj.in_features,
        "num_attention_heads": block.attn.num_heads,
        "num_hidden_layers": len(blocks),
        "intermediate_size": block.mlp.c_fc.out_features,
        "hidden_act": "gelu" if isinstance(block.mlp.gelu, nn.GELU) else "quick_gelu",
        "layer_norm_eps": block.ln_1.eps,
    }


def _norm(name: str, norm: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}


def _layers(tower: str, blocks: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for number, block in enumerate(blocks):
        name = f"{tower}.encoder.layers.{number}"
        state |= _norm(f"{name}.layer_norm1", block.ln_1) | _norm(f"{name}.layer_norm2", block.ln_2)
        for part, weight, bias in zip("qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)):
            state |= {f"{name}.self_attn.{part}_proj.weight": weight, f"{name}.self_attn.{part}_proj.bias": bias}
        linears = {"self_attn.out_proj": block.attn.out_proj, "mlp.fc1": block.mlp.c_fc, "mlp.fc2": block.mlp.c_proj}
        for part, linear in linears.items():
            state |= {f"{name}.{part}.weight": linear.weight, f"{name}.{part}.bias": linear.bias}
    return {key: torch.as_tensor(value) for key, value in state.items()}
