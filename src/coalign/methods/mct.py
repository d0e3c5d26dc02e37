"""MCT: Yuan et al. 2021, "Multimodal Contrastive Training for Visual Representation Learning"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.losses.contrastive import common_tags, queue_info_nce, tag_info_nce
from coalign.losses.ranking import margin_ranking
from coalign.method import Method
from coalign.networks.ema import ema_copy, momentum_for, move_ema
from coalign.networks.heads import spread
from coalign.networks.queue import FeatureQueue
from coalign.networks.towers import TowerSpec, build_image_tower, build_text_tower
from coalign.recipes.mct import MOST_MOVED, MCTConfig
from coalign.types import Batch, Features, Gather, LossTerm, StepInfo, TextPolicy, ViewPlan

MODALITIES = ("image", "text")
MOST_POSITIVES = 0.02  # share of the queue, where ε is derived
# Each term's query and key: a modality, and which of its heads. A key waits in the queue of its head.
TERMS = {
    "j_ii": ("image_intra", "image_intra"),
    "j_tag": ("image_intra", "image_intra"),
    "j_cc": ("text_intra", "text_intra"),
    "j_ic": ("image_inter", "text_inter"),
    "j_ci": ("text_inter", "image_inter"),
}


class MCT(Method):
    """J = J_ii + λ_tag·J_tag + λ_cc·J_cc + λ·(J_ic + J_ci) (Eq. 15): queries of one view of image and caption, and keys of another view
    by momentum encoders, in queues."""

    def __init__(self, config: MCTConfig, towers: TowerSpec) -> None:
        super().__init__()
        self.config = config
        self.terms = {name: tuple(map(self._head_name, TERMS[name])) for name in config.terms}
        query_heads, key_heads = ({pair[side] for pair in self.terms.values()} for side in (0, 1))
        self.query_heads, self.key_heads = sorted(query_heads), sorted(key_heads)
        self.view_plan = self._view_plan()

        bidirectional = config.text_attention == "bidirectional"
        self.image = build_image_tower(towers)
        self.text = build_text_tower(
            towers, attention=config.text_attention, pooling="start" if bidirectional else "end"
        )
        widths = {"image": self.image.width, "text": self.text.width}
        self.image.projection, self.text.projection = nn.Identity(), nn.Identity()  # the heads are in their place
        search = {self._head_name(f"{modality}_inter") for modality in MODALITIES}
        self.heads = nn.ModuleDict()
        for name in sorted(query_heads | key_heads | search):
            hidden = nn.Linear(widths[_modality(name)], config.head_hidden)
            self.heads[name] = nn.Sequential(hidden, nn.ReLU(), nn.Linear(config.head_hidden, self._dim(name)))
            self.heads[name].requires_grad_(name in query_heads)
        trained = {_modality(name) for name in query_heads}
        self.image.requires_grad_("image" in trained)
        self.text.requires_grad_("text" in trained)

        self.momentum_towers = nn.ModuleDict(
            {modality: ema_copy(self.towers[modality]) for modality in sorted(map(_modality, key_heads))}
        ).eval()  # see `train`
        self.momentum_heads = nn.ModuleDict({name: ema_copy(self.heads[name]) for name in self.key_heads})
        self.queues = nn.ModuleDict({name: self._new_queue(name) for name in self.key_heads})
        self.followed: dict[str, Tensor] = {}  # of the last step, to look at; no part of the state

    @property
    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.image, "text": self.text}

    def train(self, mode: bool = True) -> MCT:
        """Keys are normalised by running statistics, never by those of their batch: a query could tell its own key by them."""
        super().train(mode)
        self.momentum_towers.eval()
        return self

    def encode(self, batch: Batch, step: StepInfo) -> Features:
        """q (Eqs. 1, 6, 9 and 12), [batch, dim] by head."""
        features = _embed(batch, "query", self.query_heads, self.towers, self.heads)
        has_image = torch.ones_like(batch.has_caption) if batch.has_image is None else batch.has_image
        features |= {name: getattr(batch, name) for name in ("indices", "caption_ids", "has_caption")}  # [batch]
        features["has_image"] = has_image
        if self.config.j_tag:
            assert batch.tags is not None
            tags = batch.tags[:, : self.config.max_tags]
            features["tags"] = F.pad(tags, (0, self.config.max_tags - tags.shape[1]), value=-1)  # [batch, tag]
        return features

    def encode_targets(self, batch: Batch, step: StepInfo) -> Features:
        """k⁺ (Eqs. 2, 7, 10 and 13), [batch, dim] by head."""
        return _embed(batch, "key", self.key_heads, self.momentum_towers, self.momentum_heads)

    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        """Own queries against own keys and the queues, which are the same on every rank: no features are gathered here."""
        config, has_image, has_caption = self.config, features["has_image"], features["has_caption"]
        imaged, captioned, paired = (
            rows.nonzero().squeeze(1) for rows in (has_image, has_caption, has_image & has_caption)
        )
        self.followed = {"teacher_momentum": torch.tensor(self._momentum(step))}
        terms = []
        if config.j_ii or config.j_tag:
            queries, keys, queue, ignored = self._compared(
                "j_ii" if config.j_ii else "j_tag", imaged, features, targets
            )
            losses = queue_info_nce(queries, keys, queue, config.temperature, ignored)  # [row]
            if config.j_ii:  # Eq. 3
                terms.append(LossTerm("j_ii", losses.sum(), len(losses)))
            if config.j_tag:  # Eqs. 4 and 5, of those that have tags
                tags = features["tags"][imaged]
                tagged = (tags >= 0).any(1).nonzero().squeeze(1)
                positives = self._positives(tags[tagged], ignored[tagged], gather)
                losses = tag_info_nce(
                    losses[tagged], queries[tagged], keys[tagged], queue, config.temperature, positives
                )
                terms.append(LossTerm("j_tag", losses.sum(), len(tagged), config.tag_weight))
        if config.j_cc:  # Eq. 8
            queries, keys, queue, ignored = self._compared("j_cc", captioned, features, targets)
            losses = queue_info_nce(queries, keys, queue, config.temperature, ignored)
            terms.append(LossTerm("j_cc", losses.sum(), len(captioned), config.text_weight))
        for name in ("j_ic", "j_ci"):
            if name in self.terms:  # Eqs. 11 and 14
                queries, keys, queue, ignored = self._compared(name, paired, features, targets)
                sums = margin_ranking(queries, keys, queue, config.margin, ignored)  # [row]
                means = sums / (~ignored).sum(1, dtype=torch.int32).clamp(min=1)
                weight = config.inter_weight * config.margin_negatives
                terms.append(LossTerm(name, means.sum(), len(paired), weight))
        return terms

    def _compared(
        self, name: str, rows: Tensor, features: Features, targets: Features
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a term compares for some rows of the batch: queries and own keys [row, dim], the keys of the queue [queue, dim], and which
        of these are no negatives, bool [row, queue]: empty slots, and what is true of the row as well."""
        query, key = self.terms[name]
        queue = self._queue(key)
        ignored = ~queue.filled.expand(len(rows), -1)
        if self.config.multi_positive:
            ignored = ignored | (features["indices"][rows, None] == queue["indices"])
            if name not in ("j_ii", "j_tag"):
                ignored = ignored | (features["caption_ids"][rows, None] == queue["caption_ids"])
        if len(rows):
            self.followed[f"{query}_spread"] = spread(features[query].detach()[rows])
        return features[query][rows], targets[key][rows], queue["embeds"], ignored

    @torch.no_grad()
    def _positives(self, tags: Tensor, ignored: Tensor, gather: Gather) -> Tensor:
        """P without the own key (Eq. 4), bool [row, queue], of rows with these tags: those with more than ε common tags."""
        queue = self._queue(self.terms["j_tag"][1])
        counts = common_tags(tags, queue["tags"])
        threshold = torch.tensor(self.config.tag_threshold or 0, device=counts.device)
        if self.config.tag_threshold is None:
            # over the global batch, the least ε that makes at most MOST_POSITIVES of the queue positive
            pairs = torch.bincount(counts.flatten(), minlength=self.config.max_tags + 1)  # by number of common tags
            pairs = gather(pairs[None]).sum(0)
            above = pairs.sum() - pairs.cumsum(0)  # those with more than 0, 1, …
            threshold = (above > MOST_POSITIVES * pairs.sum() * queue.fill).sum()
        positives = (counts > threshold) & ~ignored
        slots = len(tags) * queue.filled.sum()
        self.followed["tag_threshold"] = threshold
        self.followed["tag_positives"] = positives.sum(dtype=torch.int32) / slots.clamp(min=1)
        return positives

    def _momentum(self, step: StepInfo) -> float:
        given = self.config.teacher_momentum
        return momentum_for(step.total_steps, updates=46, least=0.001, most=MOST_MOVED) if given is None else given

    @torch.no_grad()
    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        momentum = self._momentum(step)
        for modality, tower in self.momentum_towers.items():
            move_ema(tower, self.towers[modality], momentum)
        for name, head in self.momentum_heads.items():
            move_ema(head, self.heads[name], momentum)
        rows: Features = {
            name: gather(features[name]) for name in ("indices", "caption_ids", "tags") if name in features
        }
        real = {"image": gather(features["has_image"]), "text": gather(features["has_caption"])}
        for name in self.key_heads:
            queue, rows["embeds"] = self._queue(name), gather(targets[name])
            entering = real[_modality(name)]
            queue.push(**{column: rows[column][entering] for column in queue.columns})

    def scalars(self) -> dict[str, Tensor]:
        """The momentum, how full the queues are (the emptiest), ε and the share of its queue that it makes positive for an image, and the
        spread of the queries: near 1 where they point everywhere, 0 where they have collapsed."""
        return {"queue_fill": torch.stack([self._queue(name).fill for name in self.key_heads]).min(), **self.followed}

    def encode_image(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.heads[self._head_name("image_inter")](self.image(pixels)), dim=-1)

    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return F.normalize(self.heads[self._head_name("text_inter")](self.text(ids, lengths).pooled), dim=-1)

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        groups: dict[str, Sequence[nn.Parameter]] = {}
        for modality, tower in self.towers.items():
            modules = [tower, *(head for name, head in self.heads.items() if _modality(name) == modality)]
            groups[modality] = [p for module in modules for p in module.parameters() if p.requires_grad]
        return groups

    # ------------------------------------------------------------ building

    def _head_name(self, name: str) -> str:
        return name if self.config.heads == "distinct" else f"{_modality(name)}_unified"

    def _dim(self, head: str) -> int:
        return self.config.intra_dim if head.endswith("intra") else self.config.inter_dim

    def _view_plan(self) -> ViewPlan:
        """The views that some term needs. Captions and images that are not in the data are done without."""
        sides = {"query": self.query_heads, "key": self.key_heads}
        views = {
            modality: [view for view, heads in sides.items() if modality in map(_modality, heads)]
            for modality in MODALITIES
        }
        return ViewPlan(
            images=dict.fromkeys(views["image"], self.config.image_view),
            texts=dict.fromkeys(views["text"], TextPolicy("paraphrase")),
            tags=self.config.num_tags if self.config.j_tag else 0,
            captionless=bool(views["image"]),
            imageless=bool(views["text"]),
        )

    def _new_queue(self, head: str) -> FeatureQueue:
        """Empty. Tags are aligned with the keys that J_tag compares."""
        none = torch.tensor(-1)
        columns = {"embeds": torch.zeros(self._dim(head)), "indices": none, "caption_ids": none}
        if self.config.j_tag and head == self.terms["j_tag"][1]:
            columns["tags"] = none.expand(self.config.max_tags)
        return FeatureQueue(self.config.queue_size, **columns)

    def _queue(self, head: str) -> FeatureQueue:
        queue = self.queues[head]
        assert isinstance(queue, FeatureQueue)
        return queue


def _modality(head: str) -> str:
    return head.partition("_")[0]


def _embed(
    batch: Batch, view: str, heads: Iterable[str], towers: dict[str, nn.Module] | nn.ModuleDict, mlps: nn.ModuleDict
) -> Features:
    """The normalised outputs of some heads, of one view of image and caption: a tower runs once for all of its heads."""
    features: Features = {}
    for modality in dict.fromkeys(map(_modality, heads)):
        if modality == "image":
            features[modality] = towers["image"](batch.images[view].pixels)
        else:
            features[modality] = towers["text"](batch.texts[view].ids, batch.texts[view].lengths).pooled
    return {head: F.normalize(mlps[head](features[_modality(head)]), dim=-1) for head in heads}


# Implementation details, each with its source ([p] stated in the paper, [c] read in released code of MoCo, [i] inferred). The paper's own
# code is not public:
# - Queries are compared with their own key and the queue as it was before the step; then the keys enter, those of all ranks once, in
#   global order, and the momentum encoders move, at 0.999 [p, c]; in runs of under 46,000 steps less, down to 0.99, so that they
#   average the same part of a run, and the small recipe's queues are so short that no key is of an encoder that has moved on: with 0.9 and
#   queues of eight batches the margin losses fell to a quarter and the shared space collapsed (measured: a spread of 0.01) [i].
# - MoCo's queue starts with random vectors [c]; ours is empty, and empty slots are no negatives. With an empty queue, the first step's
#   terms are zero, as is their gradient [i].
# - Keys are normalised by the momentum encoder's running statistics, an average over steps. MoCo shuffles the batch between devices so
#   that a query and its key do not share BatchNorm statistics, by which they could be told from the queue's keys [c]; running statistics
#   are no batch's at all (as in EMAN, Cai et al. 2021), and a key depends on its own image alone, on any slices and ranks [i].
# - P holds the own key also where a sample has too few tags to share them with itself: Eq. 4 as printed drops it [i]. J_tag is over the
#   samples that have tags, J_cc, J_ic and J_ci over those that have a caption, J_ii over all [p: "doesn't require all images to have
#   tags"], and texts without an image add to J_cc alone [i]. The keys of all images wait in the images' queues, and those of all captions
#   in the texts'; what stands in for a caption or an image that is not there does not [i].
# - ε is 2 [p]. On other tags it would make next to none or a quarter of the queue positive: the small recipe takes the least ε at which
#   at most 2 % are [i].
# - J_ic and J_ci are sums over K = 32,768 (COCO) or 65,536 (Stock) [p]. With fewer negatives, as in a short run or while a queue fills,
#   it is their mean times that number, so that λ keeps its meaning [i].
# - Eq. 7 names the momentum caption head Φ_ik; it is Φ_ck, the copy of Φ_cq in Eq. 6 [i]. Elsewhere the subscript of a head is the
#   modality whose space it leads to: q_ic is of f_iq with φ_cq.
# - Heads of two layers, hidden 2048, ReLU, no BatchNorm, to 128 and 1024 dimensions [p; no BatchNorm c]. They take the towers' own
#   features: of ResNet-50 the average pool, 2048-d [p], of the text tower the start token after the final norm, without BERT's pooler,
#   which would be a third layer [i]. "Unified" is one head for all terms of its modality, and one queue [p].
# - Captions: two different paraphrases of one caption (back-translation through French or German [p]), which the data must bring; where
#   there is one, the original is the other, and without any it is both [i].
# - The text tower is a pretrained BERT-base at SGD's 4e-5 with `mct-coco-bert` [p]; without its dropout, which momentum encoders and a
#   second pass for micro-batches would see otherwise [i]. Else it has BERT-base's shape and attention, but CLIP's vocabulary and norms
#   before the sublayers, and starts from random weights: "scratch" (54.6 against 54.9) [p]. SGD at 4e-5 would leave that where it
#   starts: AdamW [i].
# - Images: MoCo-v2's augmentations [p]; rates [c]. Learning rates fall on a cosine to 0, without warm-up [p, c].
# - Search and zero-shot use the online towers and inter heads; what no term trains (all of the text, in J_ii alone) stays random there.
# - `multi_positive` (ours, off by default): keys of the same sample, from an earlier epoch, are no negatives, nor are those with the same
#   caption in J_cc, J_ic and J_ci. Without it, a queue larger than the data makes a sample its own negative.
# - A sample's tags beyond `max_tags` are left out, the rarest first: COCO has fewer, and stock agencies allow about 50.
