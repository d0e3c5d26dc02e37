"""CLIP: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.losses.contrastive import clip_loss
from coalign.losses.tiled import contrast_labels
from coalign.methods.clip.config import CLIPConfig
from coalign.networks.heads import MLP
from coalign.networks.logit_scale import LogitScale
from coalign.networks.towers.hugging_face import HuggingFaceTextTower
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.side_by_side import both
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower
from coalign.networks.two_towers import TwoTowers
from coalign.types import Batch, Features, Gather, LossTerm, StepInfo, TextPolicy, ViewPlan


class CLIP(TwoTowers):
    """L = ½ · [InfoNCE(image → text) + InfoNCE(text → image)] over the pairs of a batch (Fig. 3).

    With n strong views of image and caption (Fini et al. 2023), (L + n · L_strong) / (1 + n): L_strong is the mean of L over the n × n
    pairs of strong views, with smoothed labels, projectors and a temperature of its own.
    """

    encodes_both = True

    def __init__(self, config: CLIPConfig, towers: TowerSpec) -> None:
        super().__init__()
        self.config = config
        self.strong = [f"strong_{number + 1}" for number in range(config.strong_views)]
        self.view_plan = ViewPlan(
            images={"image": config.image_view, **dict.fromkeys(self.strong, config.strong_image_view)},
            texts={"caption": TextPolicy(), **dict.fromkeys(self.strong, TextPolicy(config.strong_text))},
        )
        self.image = build_image_tower(towers)
        self.text = build_text_tower(towers, attention="causal", pooling="end")
        self.logit_scale = LogitScale(config.temperature)
        if self.strong:
            widths = [config.projector_width, config.projector_width, self.image.embed_dim]
            self.image_projector, self.text_projector = (
                MLP([tower.width, *widths]) for tower in (self.image, self.text)
            )
            self.strong_logit_scale = LogitScale(config.strong_temperature)
        if config.text_dropout and isinstance(self.text, HuggingFaceTextTower):
            raise UserError("A Hugging Face text encoder has no text_dropout; use --text-dropout 0.")
        self.dropout = {"dropout": config.text_dropout} if config.text_dropout else {}

    def encode(self, batch: Batch, step: StepInfo) -> Features:
        return both(lambda: self._encode_images(batch), lambda: self._encode_texts(batch)) | batch.ids()  # [batch] each

    def _encode_images(self, batch: Batch) -> Features:
        features = {"image_embeds": self.encode_image(batch.images["image"].pixels)}  # [batch, dim]
        if self.strong:  # before the projection: the projectors of strong views are MLPs on the towers' features
            strong = [self.image(batch.images[name].pixels).pooled for name in self.strong]
            features["strong_images"] = torch.stack(strong, 1)  # [batch, view, width]
        return features

    def _encode_texts(self, batch: Batch) -> Features:
        caption, strong = batch.texts["caption"], [batch.texts[name] for name in self.strong]
        features = {"text_embeds": self.encode_text(caption.ids, caption.lengths)}  # [batch, dim]
        if strong:
            views = [self.text(text.ids, text.lengths, **self.dropout).pooled for text in strong]
            features["strong_texts"] = torch.stack(views, 1)  # [batch, view, width]
        return features

    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        image_embeds, text_embeds = features["image_embeds"], features["text_embeds"]
        positives, count, num_strong = gather.global_indices(image_embeds), len(image_embeds), len(self.strong)
        labels = contrast_labels(features, gather, self.config.multi_positive)
        all_images, all_texts = gather(image_embeds), gather(text_embeds)  # [global_batch, dim]
        loss = clip_loss(image_embeds, text_embeds, all_images, all_texts, positives, self.logit_scale(), labels)
        terms = [LossTerm("clip", loss, count, weight=1 / (1 + num_strong))]
        if self.strong:
            images = self._project(self.image_projector, features["strong_images"], gather)
            texts = self._project(self.text_projector, features["strong_texts"], gather)
            scale, smoothing = self.strong_logit_scale(), self.config.label_smoothing
            losses = [
                clip_loss(image, text, images_, texts_, positives, scale, labels, smoothing)
                for image, images_ in images
                for text, texts_ in texts
            ]
            loss = torch.stack(losses).mean()
            terms.append(LossTerm("strong", loss, count, weight=num_strong / (1 + num_strong)))
        return terms

    def _project(self, projector: MLP, features: Tensor, gather: Gather) -> list[tuple[Tensor, Tensor]]:
        """features [batch, view, width] -> for each view, a separate batch for BatchNorm: embeds [batch, dim] and [global_batch, dim]."""
        views = [F.normalize(projector(view, gather.sum), dim=-1) for view in features.unbind(1)]
        return [(view, gather(view)) for view in views]

    @torch.no_grad()
    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        for scale in self._scales().values():
            scale.clamp_(self.config.max_logit_scale)

    def scalars(self) -> dict[str, Tensor]:
        return {name: scale().detach() for name, scale in self._scales().items()}

    def _scales(self) -> dict[str, LogitScale]:
        strong = {"strong_logit_scale": self.strong_logit_scale} if self.strong else {}
        return {"logit_scale": self.logit_scale, **strong}

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        groups = {role: list(parameters) for role, parameters in super().parameter_groups().items()}
        if self.strong:
            groups["image"] += self.image_projector.parameters()
            groups["text"] += self.text_projector.parameters()
        return {**groups, "scale": [scale.log for scale in self._scales().values()]}


# Implementation details and their sources ([p] stated in the paper, [c] read in released code, [i] inferred):
# - The log-scale starts at ln(1/0.07) and is clamped to [0, ln 100] [p]. The clamp is applied to the parameter after the step [c, SLIP],
#   so it does not change the gradient at the bound.
# - The image view is a random resized crop of 50-100 % of the area, without a flip [c, SLIP's baseline]; the paper uses "a random square
#   crop" [p].
# - Text: lower-cased BPE, causal Transformer, feature of the end token [p]. Captions are packed without padding, which does not change
#   the outputs.
# - `multi_positive` (ours, off by default) removes pairs with the same caption from each other's denominators, the groups of
#   `--group-column` those of the same group.
# - Logits are computed in float32 under bf16 and fp16 autocast [i].
# - Strong views are off by default [p]. They follow CLIP 🚀 of Fini et al. 2023: what is marked [c] below is read in its released code.
# - Strong views: two images with SimCLR's augmentations and two augmented captions; all four pairs are contrasted [c]. The loss is the
#   mean over the weak pair and the strong views; for more pairs than CC3M, the code doubles it [c], which AdamW cancels.
# - Strong views pass an MLP per tower, width → 4096 → 4096 → dim with BatchNorm and ReLU, and have a temperature of their own, from
#   0.1 [c]. CLIP's linear projections see the weak pair only. They are what is evaluated and exported; the code chooses its best
#   checkpoint by them, and also evaluates the MLPs and mixtures of both similarities [c].
# - Label smoothing is 0.1, for strong views only [c]. A row's target is spread over the columns of its denominator, without those that
#   `multi_positive` removes [i].
# - Text dropout acts on the residual stream before each block, for strong views only, with probability 0.2 on CC3M, 0.05 on CC12M and
#   0 on YFCC15M [c]. Each slice of a micro-batched step draws its own.
# - Text augmentation: EDA's three operations with equal probability [i]. The code has synonym replacement, swap and deletion with
#   probability .4, .4 and .2, after it has removed stop words with probability .8, also from the weak view's caption [c].
