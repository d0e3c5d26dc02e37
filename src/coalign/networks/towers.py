"""Image and text towers by name: open_clip's model configurations, JSON files in the same form, timm trunks, and our small ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import open_clip
import timm
import torch
from jaxtyping import Float, Int
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower
from open_clip.transformer import TextTransformer, VisionTransformer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.networks.batch_norm import group_batch_norms
from coalign.networks.transformer import is_plain, pack, run_blocks

if TYPE_CHECKING:
    from coalign.networks.hugging_face_text import HuggingFaceTextTower

OWN_CONFIGS = Path(__file__).parent / "configs"
OF_A_PART = (None, "timm", "hf")  # words for `pretrained` that are of one tower, or none


@dataclass(frozen=True)
class TowerSpec:
    """Which towers a method gets. `name` is a model name, a JSON file, or `timm:TRUNK` (beside `small`'s text tower)."""

    name: str
    vocab_size: int
    context_length: int = 77
    image_size: int | None = None  # None: the model's own
    # an open_clip tag, a safetensors file of an open_clip model or of a timm trunk, "timm" for a trunk's own weights, "hf" for a Hugging
    # Face text tower's
    pretrained: str | None = None
    batch_norm_group: int = 32


class ImageTower(nn.Module):
    """Pixels -> features, the trunk's output before the projection into the shared space."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, trunk: nn.Module, width: int, embed_dim: int, image_size: int, projection: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.trunk, self.width, self.embed_dim, self.image_size = trunk, width, embed_dim, image_size
        self.projection = projection or new_projection(width, embed_dim)
        # open_clip's and CLIP's normalisation
        self.register_buffer("mean", torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1) * 255, persistent=False)

    def forward(self, pixels: Tensor) -> Float[Tensor, "batch width"]:
        """uint8 pixels [batch, 3, image_size, image_size] -> features [batch, width]."""
        pixels = (pixels.to(self.mean.dtype) - self.mean) / self.std
        trunk = self.trunk
        if not isinstance(trunk, VisionTransformer) or not is_plain(trunk.transformer):
            return trunk(pixels)
        x = trunk._embeds(pixels)  # [batch, token, width]
        (batch, num_tokens), x = x.shape[:2], x.flatten(0, 1)
        packing = pack([num_tokens] * batch, x.device)
        if trunk.pool_type == "tok" and trunk.attn_pool is None:  # only the class token is read
            read = torch.arange(0, batch * num_tokens, num_tokens, device=x.device)
            return trunk._pool(run_blocks(trunk.transformer, x, packing, read=read)[:, None])[0]
        return trunk._pool(run_blocks(trunk.transformer, x, packing).unflatten(0, (batch, num_tokens)))[0]


class TextFeatures(NamedTuple):
    pooled: Tensor  # [batch, width]
    tokens: Tensor | None  # [batch, token, width], after the final norm, zero beyond a caption's length


class TextTower(nn.Module):
    """open_clip's text Transformer with our forward: any length up to the context, padding by length, three poolings.

    `attention` "bidirectional" masks padding. `pooling`: "end" (CLIP), "start" (UniCLIP; needs bidirectional attention), "mean" over the
    caption's tokens. An output depends on a caption's own tokens only, so they are packed, and padding costs nothing: most captions use
    a sixth of the positions.
    """

    def __init__(
        self,
        transformer: TextTransformer,
        embed_dim: int,
        attention: Literal["causal", "bidirectional"],
        pooling: Literal["end", "start", "mean"],
        projection: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if pooling == "start" and attention == "causal":
            raise ValueError("under causal attention the start token sees nothing of the caption")
        self.transformer, self.attention, self.pooling = transformer, attention, pooling
        self.width, self.embed_dim, self.context_length = transformer.width, embed_dim, transformer.context_length
        self.projection = projection or new_projection(self.width, embed_dim)

    def forward(
        self, ids: Int[Tensor, "batch token"], lengths: Int[Tensor, " batch"], with_tokens: bool = False
    ) -> TextFeatures:
        if ids.shape[1] > self.context_length:
            raise ValueError(f"{ids.shape[1]} tokens, but the text tower has {self.context_length} positions")
        tower, device = self.transformer, ids.device
        by_length = lengths.argsort(stable=True)
        ids, sorted_lengths = ids[by_length], lengths[by_length]
        packing = pack(sorted_lengths.tolist(), device)
        valid = torch.arange(ids.shape[1], device=device) < sorted_lengths[:, None]  # [batch, token]
        row, position = valid.nonzero(as_tuple=True)  # [tokens]
        x = tower.token_embedding(ids[row, position]) + F.embedding(position, tower.positional_embedding)
        causal, ends = self.attention == "causal", sorted_lengths.cumsum(0) - 1
        read = ends - sorted_lengths + 1 if self.pooling == "start" else ends
        place = by_length.argsort()  # where each caption is among the sorted
        if self.pooling != "mean" and not with_tokens:
            x = tower.ln_final(run_blocks(tower.transformer, x, packing, causal, read))  # [batch, width]
            return TextFeatures(x.index_select(0, place), None)
        x = tower.ln_final(run_blocks(tower.transformer, x, packing, causal))  # [tokens, width]
        tokens = x.new_zeros(ids.numel(), self.width).index_copy(0, by_length[row] * ids.shape[1] + position, x)
        tokens = tokens.view(*ids.shape, self.width)
        if self.pooling == "mean":
            pooled = tokens.sum(1) / lengths[:, None].to(tokens.dtype)
        else:
            pooled = x.index_select(0, read[place])
        return TextFeatures(pooled, tokens if with_tokens else None)


def new_projection(width: int, embed_dim: int) -> nn.Linear:
    projection = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)  # CLIP's
    return projection


# ---------------------------------------------------------------- by name


def model_names() -> list[str]:
    """Every name that `--model` takes, besides files and `timm:` trunks."""
    return sorted(path.stem for path in OWN_CONFIGS.glob("*.json")) + open_clip.list_models()


def model_config(name: str) -> dict[str, Any]:
    """The configuration of a model name, a JSON file, or `timm:TRUNK`, in open_clip's form."""
    if name.startswith("timm:"):
        trunk = name.removeprefix("timm:")
        if not timm.is_model(trunk):
            near = timm.list_models(f"*{trunk.split('.')[0][:6]}*")[:5]
            raise UserError(
                f"timm has no model named {trunk!r}" + (f"; did you mean {', '.join(near)}?" if near else ".")
            )
        config = json.loads((OWN_CONFIGS / "small.json").read_text())
        return {**config, "vision_cfg": {"timm_model_name": trunk, "image_size": config["vision_cfg"]["image_size"]}}
    if (Path(name) / "open_clip_config.json").is_file():  # a folder of open_clip's
        return model_config(str(Path(name) / "open_clip_config.json"))
    path = OWN_CONFIGS / f"{name}.json"
    if not path.exists() and name.endswith(".json"):
        path = Path(name)
        if not path.exists():
            raise UserError(f"The model file {name} does not exist.")
    if path.exists():
        try:
            config = json.loads(path.read_text())
        except (ValueError, UnicodeDecodeError) as error:
            raise UserError(f"The model file {path} is not JSON: {error}.") from error
        if isinstance(config, dict) and "model_cfg" in config:
            config = config["model_cfg"]
    else:
        config = open_clip.get_model_config(name)
    if config is None:
        import difflib

        near = difflib.get_close_matches(name, model_names(), 4, 0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see `coalign models`."
        raise UserError(f"There is no model named {name!r}; {hint}")
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config)
    if missing:
        raise UserError(
            f"The model {name} lacks {', '.join(sorted(missing))} (open_clip's configuration form is expected)."
        )
    return config


def build_image_tower(spec: TowerSpec) -> ImageTower:
    """The image tower of `spec`, randomly initialised, or pretrained where `spec.pretrained` says so."""
    config = model_config(spec.name)
    vision, embed_dim = dict(config["vision_cfg"]), config["embed_dim"]
    size = spec.image_size or vision.get("image_size", 224)
    if isinstance(size, (list, tuple)):
        raise UserError(
            f"The model {spec.name} takes images of {size[0]} × {size[1]} pixels; only square ones are supported."
        )
    if _is_of_trunk(spec):
        tower = build_image_tower(replace(spec, pretrained=None))
        trunk: Any = getattr(tower.trunk, "trunk", tower.trunk)  # open_clip's adapter has it within
        weights = load_file(_weights_file(spec.pretrained) or "")
        heads = trunk.pretrained_cfg.get("classifier") or ()  # a file of the hub has them, the tower has not
        for head in (heads,) if isinstance(heads, str) else heads:
            weights = {key: value for key, value in weights.items() if not key.startswith(f"{head}.")}
        try:
            trunk.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"The weights {spec.pretrained} are not those of {spec.name}'s trunk: {reason}") from error
        return tower
    if spec.pretrained not in OF_A_PART:
        visual = _pretrained(spec).visual
    elif spec.name.startswith("timm:") or "timm_kwargs" in vision:
        trunk = _timm_trunk(vision, size, spec.pretrained == "timm")
        width: int = trunk.num_features
        return ImageTower(group_batch_norms(trunk, spec.batch_norm_group), width, embed_dim, size)
    else:
        vision.update(image_size=size, timm_model_pretrained=False)
        visual = _build_vision_tower(embed_dim, CLIPVisionCfg(**vision), config.get("quick_gelu", False))
    width, projection = take_projection(visual, embed_dim)
    return ImageTower(group_batch_norms(visual, spec.batch_norm_group), width, embed_dim, size, projection)


def take_projection(visual: Any, embed_dim: int) -> tuple[int, nn.Module]:
    """Takes the projection off one of open_clip's image towers: the width of what is left, and the projection."""
    if isinstance(visual, VisionTransformer):
        projection = transposed(visual.proj)
        visual.proj = None
        return projection.in_features, projection
    last = getattr(getattr(visual, "head", None), "proj", None)  # of open_clip's timm adapter
    if isinstance(last, nn.Linear):
        visual.head.proj = nn.Identity()
        return last.in_features, last
    return embed_dim, nn.Identity()  # an attention pool or an MLP that leads into the shared space itself


def transposed(matrix: Tensor) -> nn.Linear:
    """The linear layer of an open_clip projection [width, embed_dim]."""
    width, embed_dim = matrix.shape
    projection = nn.Linear(width, embed_dim, bias=False, device=matrix.device)
    projection.weight.data.copy_(matrix.data.T)
    return projection


@lru_cache(maxsize=1)  # both towers ask for it
def _pretrained(spec: TowerSpec) -> Any:
    """open_clip's model with the weights of `spec.pretrained`, one of its tags or a safetensors file of one of its models."""
    tag, file = spec.pretrained or "", _weights_file(spec.pretrained)
    config = dict(model_config(spec.name))
    if file:
        vision = {**config["vision_cfg"], "image_size": spec.image_size or config["vision_cfg"].get("image_size", 224)}
        model = open_clip.CustomTextCLIP(
            config["embed_dim"], vision, config["text_cfg"], quick_gelu=config.get("quick_gelu", False)
        )
        try:
            open_clip.load_checkpoint(model, file)
        except (RuntimeError, KeyError, AssertionError, SafetensorError) as error:
            raise UserError(f"The weights {tag} are not those of {spec.name}: {str(error).splitlines()[0]}") from error
        return model
    tags = open_clip.list_pretrained_tags_by_model(spec.name)
    if tag in tags:
        check_activation(spec.name, tag)
    if tag not in tags:
        known = f"it has {', '.join(tags)}, or give a .safetensors file" if tags else "give a .safetensors file"
        raise UserError(f"The model {spec.name} has no weights named {tag!r}; {known}.")
    try:
        return open_clip.create_model(
            spec.name, pretrained=tag, force_custom_text=True, force_image_size=spec.image_size, device="cpu"
        )
    except Exception as error:  # the hub's client has many: no network, no such file, offline mode
        raise UserError(
            f"The weights {tag} of {spec.name} could not be fetched: {str(error).splitlines()[0]}"
        ) from error


def check_activation(name: str, tag: str) -> None:
    """UserError for weights that were trained with another activation than the model's, of which open_clip only warns."""
    theirs = bool((open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu", False))
    if theirs != bool(model_config(name).get("quick_gelu", False)):
        other = f"{name}-quickgelu" if theirs else name.removesuffix("-quickgelu")
        raise UserError(f"The weights {tag} were trained with the activation of {other}; use this model's name.")


def _weights_file(pretrained: str | None) -> str | None:
    """The safetensors file that is meant: itself, or the one in the folder of that name. None where it is no file's name."""
    if pretrained and Path(pretrained).is_dir():
        found = sorted(Path(pretrained).glob("*.safetensors"))
        if len(found) != 1:
            raise UserError(f"{pretrained} holds {len(found)} .safetensors files; name the one with the weights.")
        return str(found[0])
    if not pretrained or not pretrained.endswith(".safetensors"):
        return None
    if not Path(pretrained).is_file():
        raise UserError(f"The weights {pretrained} do not exist.")
    return pretrained


def _is_of_trunk(spec: TowerSpec) -> bool:
    """Whether `spec.pretrained` is a file of a timm trunk's weights alone, such as `coalign export --to timm` writes."""
    file = _weights_file(spec.pretrained)
    if file is None:
        return False
    try:
        with safe_open(file, "pt") as weights:
            of_towers = any(name.startswith(("visual.", "text.")) for name in weights.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"The weights {file} cannot be read: {error}; it must be a whole safetensors file.") from error
    return not of_towers and "timm_model_name" in model_config(spec.name)["vision_cfg"]


def _timm_trunk(vision: dict[str, Any], size: int, pretrained: bool) -> nn.Module:
    name = vision["timm_model_name"]
    options = dict(vision.get("timm_kwargs", {}), num_classes=0, pretrained=pretrained)
    sizes: list[dict[str, Any]] = [{"img_size": size}, {}]
    for sized in sizes:  # Transformers must know the size, convolutions refuse to be told
        try:
            return timm.create_model(name, **options, **sized)
        except TypeError as error:
            last_error = error
    raise UserError(f"timm cannot build {name} with {options}: {last_error}.")


def build_text_tower(
    spec: TowerSpec,
    attention: Literal["causal", "bidirectional"] = "causal",
    pooling: Literal["end", "start", "mean"] = "end",
) -> TextTower | HuggingFaceTextTower:
    """The text tower of `spec`. Its vocabulary and context are the spec's, whatever the configuration says. A Hugging Face encoder attends
    both ways and has no end that knows the rest: it is read at its start, or the mean."""
    config = model_config(spec.name)
    text, embed_dim = dict(config["text_cfg"]), config["embed_dim"]
    if "hf_model_name" in text:
        if spec.pretrained not in OF_A_PART and not _is_of_trunk(spec):
            raise UserError(f"Of {spec.name}'s text tower only its own weights can be taken: --pretrained hf.")
        from coalign.networks.hugging_face_text import build_hugging_face_tower  # it builds on this file

        return build_hugging_face_tower(
            text["hf_model_name"], spec, embed_dim, "mean" if pooling == "mean" else "start"
        )
    if spec.pretrained == "hf":
        raise UserError(f"--pretrained hf: {spec.name} has no Hugging Face text tower.")
    if spec.pretrained not in OF_A_PART and not _is_of_trunk(spec):
        tower = _pretrained(spec).text
        _fit_text(tower, spec)
    else:
        text.update(
            vocab_size=spec.vocab_size, context_length=spec.context_length, no_causal_mask=attention != "causal"
        )
        text.update(embed_cls=False, proj_type="linear", proj_bias=False)
        tower = _build_text_tower(embed_dim, CLIPTextCfg(**text), config.get("quick_gelu", False))
    if not is_plain(tower.transformer):
        raise UserError(
            f"The model {spec.name} has a text tower with norms or scales within its attention, which cannot be trained here; "
            "use one with CLIP's text tower."
        )
    tower.attn_mask = None
    projection = transposed(tower.text_projection)
    tower.text_projection = None
    return TextTower(tower, embed_dim, attention, pooling, projection)


def _fit_text(tower: Any, spec: TowerSpec) -> None:
    """Gives a pretrained text tower the spec's context and rows for tokens that were appended to the vocabulary, such as [MASK]."""
    known = tower.token_embedding.num_embeddings
    if not known <= spec.vocab_size <= known + 1:
        raise UserError(
            f"The weights {spec.pretrained} know {known:,} tokens and the tokenizer has {spec.vocab_size:,}; use --tokenizer clip."
        )
    if spec.context_length > tower.context_length:
        raise UserError(
            f"The weights {spec.pretrained} have {tower.context_length} positions; use --context-length {tower.context_length} or less."
        )
    tower.positional_embedding = nn.Parameter(tower.positional_embedding.data[: spec.context_length].clone())
    tower.num_pos = tower.context_length = spec.context_length
    if spec.vocab_size > known:
        embedding = nn.Embedding(spec.vocab_size, tower.width)
        nn.init.normal_(embedding.weight, std=0.02)
        embedding.weight.data[:known] = tower.token_embedding.weight.data
        tower.token_embedding = embedding
