"""A model of two towers in the form of Hugging Face's transformers (extra "hf"): a CLIPModel, and a tokenizer of the library's."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from tokenizers import Regex, normalizers, processors
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn

from coalign.errors import UserError
from coalign.networks.towers import ImageTower, TextTower
from coalign.networks.transformer import is_plain


def to_transformers(image: ImageTower, text: TextTower, log_logit_scale: Tensor, start_id: int, end_id: int) -> Any:
    """A transformers.CLIPModel. UserError for towers that it has no place for."""
    from transformers import CLIPConfig, CLIPModel

    _check(image, text)
    vision: Any = image.trunk
    layers, words = vision.transformer.resblocks, text.transformer
    config = CLIPConfig(
        vision_config={
            **_shape(layers),
            "image_size": image.image_size,
            "patch_size": vision.conv1.kernel_size[0],
            "projection_dim": image.embed_dim,
        },
        text_config={
            **_shape(words.transformer.resblocks),
            "vocab_size": words.token_embedding.num_embeddings,
            "max_position_embeddings": text.context_length,
            "bos_token_id": start_id,
            "eos_token_id": end_id,
            "pad_token_id": end_id,
            "projection_dim": text.embed_dim,
        },
        projection_dim=image.embed_dim,
    )
    state = {
        "logit_scale": log_logit_scale.reshape(()),
        "visual_projection.weight": image.projection.get_parameter("weight"),
        "text_projection.weight": text.projection.get_parameter("weight"),
        "vision_model.embeddings.class_embedding": vision.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": vision.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": vision.positional_embedding,
        "text_model.embeddings.token_embedding.weight": words.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": words.positional_embedding,
        **_norm("vision_model.pre_layrnorm", vision.ln_pre),  # the library's spelling
        **_norm("vision_model.post_layernorm", vision.ln_post),
        **_norm("text_model.final_layer_norm", words.ln_final),
        **_layers("vision_model", layers),
        **_layers("text_model", words.transformer.resblocks),
    }
    model = CLIPModel(config).eval()
    own = {name for name in model.state_dict() if not name.endswith("position_ids")}
    model.load_state_dict({name: value.detach().cpu() for name, value in state.items()}, strict=False)
    if own != set(state):
        raise UserError(f"transformers' CLIPModel has other weights: {', '.join(sorted(own ^ set(state))[:3])}.")
    return model


def from_clip_model(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse: open_clip's model_cfg, and a state_dict of its CustomTextCLIP, of a CLIPModel. UserError for what open_clip has no words
    for."""
    vision, text = model.config.vision_config, model.config.text_config
    same = {name: {getattr(part, name) for part in (vision, text)} for name in ("hidden_act", "layer_norm_eps")}
    if any(len(values) > 1 for values in same.values()) or same["layer_norm_eps"] != {1e-5}:
        raise UserError(f"open_clip cannot hold this CLIPModel, whose towers have {same}.")
    (activation,) = same["hidden_act"]
    if activation not in ("gelu", "quick_gelu"):
        raise UserError(f"open_clip cannot hold this CLIPModel, whose activation is {activation}.")
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
    theirs = model.state_dict()
    renamed = {
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
    state = {ours: theirs[name] for ours, name in renamed.items()}
    state |= {f"{ours}.{kind}": theirs[f"{name}.{kind}"] for ours, name in norms.items() for kind in ("weight", "bias")}
    state |= {
        "logit_scale": theirs["logit_scale"],
        "visual.proj": theirs["visual_projection.weight"].T,
        "text.text_projection": theirs["text_projection.weight"].T,
    }
    for ours, name, layers in (
        ("visual", "vision_model", model.config.vision_config.num_hidden_layers),
        ("text", "text_model", model.config.text_config.num_hidden_layers),
    ):
        for number in range(layers):
            block, layer = f"{ours}.transformer.resblocks.{number}", f"{name}.encoder.layers.{number}"
            for kind in ("weight", "bias"):
                parts = [theirs[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                state[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
                for own, other in _BLOCK.items():
                    state[f"{block}.{own}.{kind}"] = theirs[f"{layer}.{other}.{kind}"]
    return {key: value.detach().float().clone().contiguous() for key, value in state.items()}


_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def preprocessor(size: int) -> dict[str, Any]:
    """preprocessor_config.json: the evaluation view as transformers makes it, whose resizing is Pillow's."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(open_clip.OPENAI_DATASET_MEAN),
        "image_std": list(open_clip.OPENAI_DATASET_STD),
    }


def to_tokenizer(backend_json: str, start: str, end: str, context_length: int) -> Any:
    """A transformers tokenizer of one of the `tokenizers` library. It lowers the case and joins white space itself; mis-decoded Unicode and
    HTML entities it leaves as they are. It pads with the end token, which no text tower of ours reads beyond."""
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        raise UserError('A tokenizer travels in the form of the extra "hf": pip install "coalign[hf]".') from None
    backend = Backend.from_str(backend_json)
    ids = [(name, backend.token_to_id(name)) for name in (start, end)]
    backend.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, eos_token=end, pad_token=end, model_max_length=context_length
    )


def _check(image: ImageTower, text: TextTower) -> None:
    trunk = image.trunk
    if not isinstance(trunk, VisionTransformer) or not is_plain(trunk.transformer):
        raise UserError(
            "transformers' CLIPModel cannot hold this image tower, which is no plain ViT; export the image tower to timm, or the model to "
            "open_clip."
        )
    fits = trunk.pool_type == "tok" and trunk.attn_pool is None and isinstance(trunk.ln_pre, nn.LayerNorm)
    if not fits or trunk.final_ln_after_pool is True or not _without_layer_scale(trunk):
        raise UserError(
            "transformers' CLIPModel cannot hold this ViT, which is pooled or normalised otherwise than CLIP's."
        )
    if text.attention != "causal" or text.pooling != "end" or not _without_layer_scale(text.transformer):
        raise UserError(
            "transformers' CLIPModel cannot hold this text tower, which attends both ways or is read elsewhere."
        )


def _without_layer_scale(tower: Any) -> bool:
    return all(isinstance(block.ls_1, nn.Identity) for block in tower.transformer.resblocks)


def _shape(blocks: Any) -> dict[str, Any]:
    block = blocks[0]
    return {
        "hidden_size": block.attn.embed_dim,
        "num_attention_heads": block.attn.num_heads,
        "num_hidden_layers": len(blocks),
        "intermediate_size": block.mlp.c_fc.out_features,
        "hidden_act": "quick_gelu" if isinstance(block.mlp.gelu, QuickGELU) else "gelu",
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
