"""MCT: Yuan et al. 2021, "Multimodal Contrastive Training for Visual Representation Learning"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.losses.contrastive import common_tags, queue_info_nce, tag_info_nce
from coalign.losses.ranking import margin_ranking
from coalign.methods.mct.config import MAX_EMA_RATE, MCTConfig
from coalign.networks.ema import ema_copy, momentum_for, update_ema
from coalign.networks.heads import spread
from coalign.networks.queue import FeatureQueue
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower
from coalign.networks.two_towers import TwoTowers
from coalign.types import Batch, Features, Gather, LossTerm, StepInfo, TextPolicy, ViewPlan

MODALITIES = ("image", "text")
MAX_POSITIVES = 0.02  # fraction of the queue, if ε is derived from the data
# Query head and key head of each term. Each key head has a queue.
TERMS = {
    "j_ii": ("image_intra", "image_intra"),
    "j_tag": ("image_intra", "image_intra"),
    "j_cc": ("text_intra", "text_intra"),
    "j_ic": ("image_inter", "text_inter"),
    "j_ci": ("text_inter", "image_inter"),
}


class MCT(TwoTowers):
    """J = J_ii + λ_tag·J_tag + λ_cc·J_cc + λ·(J_ic + J_ci) (Eq. 15).

    Queries are encoded from one view of image and caption, keys from another view by momentum encoders. Queues hold earlier keys.
    """

    length_dependent = ("the momentum of the momentum encoders",)

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
        self.image.projection, self.text.projection = nn.Identity(), nn.Identity()  # the heads replace them
        inference_heads = {self._head_name(f"{modality}_inter") for modality in MODALITIES}
        self.heads = nn.ModuleDict()
        for name in sorted(query_heads | key_heads | inference_heads):
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
        self.diagnostics: dict[str, Tensor] = {}  # of the last step, for logging only; not in the state_dict

    @property
    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.image, "text": self.text}

    def train(self, mode: bool = True) -> MCT:
        """Keeps the momentum towers in evaluation mode: batch statistics would reveal which key belongs to a query."""
        super().train(mode)
        self.momentum_towers.eval()
        return self

    def encode(self, batch: Batch, step: StepInfo) -> Features:
        """Encodes the queries q (Eqs. 1, 6, 9 and 12), [batch, dim] per head."""
        features = _embed(batch, "query", self.query_heads, self.towers, self.heads)
        has_image = torch.ones_like(batch.has_caption) if batch.has_image is None else batch.has_image
        features |= {"indices": batch.queue_ids, "has_image": has_image, "has_caption": batch.has_caption} | batch.ids()
        if self.config.j_tag:
            assert batch.tags is not None
            tags = batch.tags[:, : self.config.max_tags]
            features["tags"] = F.pad(tags, (0, self.config.max_tags - tags.shape[1]), value=-1)  # [batch, tag]
        return features

    def encode_targets(self, batch: Batch, step: StepInfo) -> Features:
        """Encodes the keys k⁺ (Eqs. 2, 7, 10 and 13), [batch, dim] per head."""
        return _embed(batch, "key", self.key_heads, self.momentum_towers, self.momentum_heads)

    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        """Compares local queries with local keys and the queues. Queues are equal on all ranks, so features need not be gathered."""
        config, has_image, has_caption = self.config, features["has_image"], features["has_caption"]
        imaged, captioned, paired = (
            valid.nonzero().squeeze(1) for valid in (has_image, has_caption, has_image & has_caption)
        )
        self.diagnostics = {"teacher_momentum": torch.tensor(self._momentum(step))}
        terms = []
        if config.j_ii or config.j_tag:
            name = "j_ii" if config.j_ii else "j_tag"
            queries, keys, queue, ignored = self._operands(name, imaged, features, targets)
            losses = queue_info_nce(queries, keys, queue, config.temperature, ignored)  # [row]
            if config.j_ii:  # Eq. 3
                terms.append(LossTerm("j_ii", losses.sum(), len(losses)))
            if config.j_tag:  # Eqs. 4 and 5, for samples with tags
                tags = features["tags"][imaged]
                tagged = (tags >= 0).any(1).nonzero().squeeze(1)
                positives = self._positives(tags[tagged], ignored[tagged], gather)
                losses = tag_info_nce(
                    losses[tagged], queries[tagged], keys[tagged], queue, config.temperature, positives
                )
                terms.append(LossTerm("j_tag", losses.sum(), len(tagged), config.tag_weight))
        if config.j_cc:  # Eq. 8
            queries, keys, queue, ignored = self._operands("j_cc", captioned, features, targets)
            losses = queue_info_nce(queries, keys, queue, config.temperature, ignored)
            terms.append(LossTerm("j_cc", losses.sum(), len(captioned), config.text_weight))
        for name in ("j_ic", "j_ci"):
            if name in self.terms:  # Eqs. 11 and 14
                queries, keys, queue, ignored = self._operands(name, paired, features, targets)
                sums = margin_ranking(queries, keys, queue, config.margin, ignored)  # [row]
                means = sums / (~ignored).sum(1, dtype=torch.int32).clamp(min=1)
                weight = config.inter_weight * config.margin_negatives
                terms.append(LossTerm(name, means.sum(), len(paired), weight))
        return terms

    def _operands(
        self, name: str, rows: Tensor, features: Features, targets: Features
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the operands of a term for some rows of the batch: queries and keys [row, dim], queued keys [queue, dim], and a mask of
        queued keys that are not negatives, bool [row, queue]: empty slots, the row's group and, with `multi_positive`, its duplicates."""
        query, key = self.terms[name]
        queue = self._queue(key)
        ignored = ~queue.filled.expand(len(rows), -1)
        if self.config.multi_positive or "group_ids" in features:
            ignored = ignored | (features["indices"][rows, None] == queue["indices"])
        if self.config.multi_positive and name not in ("j_ii", "j_tag"):
            ignored = ignored | (features["caption_ids"][rows, None] == queue["caption_ids"])
        if len(rows):
            self.diagnostics[f"{query}_spread"] = spread(features[query].detach()[rows])
        return features[query][rows], targets[key][rows], queue["embeds"], ignored

    @torch.no_grad()
    def _positives(self, tags: Tensor, ignored: Tensor, gather: Gather) -> Tensor:
        """Returns P of Eq. 4 without the row's own key, bool [row, queue]: queued keys that share more than ε tags with the row."""
        queue = self._queue(self.terms["j_tag"][1])
        counts = common_tags(tags, queue["tags"])
        threshold = torch.tensor(self.config.tag_threshold or 0, device=counts.device)
        if self.config.tag_threshold is None:
            # the smallest ε at which, over the global batch, at most MAX_POSITIVES of the queue are positives
            pairs = torch.bincount(counts.flatten(), minlength=self.config.max_tags + 1)  # by number of common tags
            pairs = gather(pairs[None]).sum(0)
            above = pairs.sum() - pairs.cumsum(0)  # pairs with more than 0, 1, … common tags
            threshold = (above > MAX_POSITIVES * pairs.sum() * queue.fill).sum()
        positives = (counts > threshold) & ~ignored
        slots = len(tags) * queue.filled.sum()
        self.diagnostics["tag_threshold"] = threshold
        self.diagnostics["tag_positives"] = positives.sum(dtype=torch.int32) / slots.clamp(min=1)
        return positives

    def _momentum(self, step: StepInfo) -> float:
        if self.config.teacher_momentum is not None:
            return self.config.teacher_momentum
        return momentum_for(step.total_steps, updates=46, min_rate=0.001, max_rate=MAX_EMA_RATE)

    @torch.no_grad()
    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        momentum = self._momentum(step)
        for modality, tower in self.momentum_towers.items():
            update_ema(tower, self.towers[modality], momentum)
        for name, head in self.momentum_heads.items():
            update_ema(head, self.heads[name], momentum)
        rows: Features = {
            name: gather(features[name]) for name in ("indices", "caption_ids", "tags") if name in features
        }
        valid = {"image": gather(features["has_image"]), "text": gather(features["has_caption"])}
        for name in self.key_heads:
            queue, rows["embeds"] = self._queue(name), gather(targets[name])
            queue.push(**{column: rows[column][valid[_modality(name)]] for column in queue.columns})

    def scalars(self) -> dict[str, Tensor]:
        """Returns the momentum, the fill of the emptiest queue, ε, the fraction of the queue it makes positive, and the spread of the
        queries: near 1 if they are evenly distributed, 0 if they have collapsed."""
        return {
            "queue_fill": torch.stack([self._queue(name).fill for name in self.key_heads]).min(),
            **self.diagnostics,
        }

    def encode_image(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.heads[self._head_name("image_inter")](self.image(pixels).pooled), dim=-1)

    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return F.normalize(self.heads[self._head_name("text_inter")](self.text(ids, lengths).pooled), dim=-1)

    def projections(self) -> dict[str, nn.Module]:
        return {}

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
        """Returns the views that the enabled terms need. Samples may lack a caption or an image."""
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
        """Returns an empty queue; the queue of J_tag's keys also stores their tags."""
        empty = torch.tensor(-1)
        columns = {"embeds": torch.zeros(self._dim(head)), "indices": empty, "caption_ids": empty}
        if self.config.j_tag and head == self.terms["j_tag"][1]:
            columns["tags"] = empty.expand(self.config.max_tags)
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
    """Returns the normalized outputs of `heads` for one view of image and caption. Each tower runs once for all its heads."""
    features: Features = {}
    for modality in dict.fromkeys(map(_modality, heads)):
        if modality == "image":
            features[modality] = towers["image"](batch.images[view].pixels).pooled
        else:
            features[modality] = towers["text"](batch.texts[view].ids, batch.texts[view].lengths).pooled
    return {head: F.normalize(mlps[head](features[_modality(head)]), dim=-1) for head in heads}


# Implementation details and their sources ([p] stated in the paper, [c] read in MoCo's released code, [i] inferred). The authors' code is
# not public:
# - A query is compared with its own key and the queue as of before the step. Then the keys of all ranks enter once, in global order, and
#   the momentum encoders move with momentum 0.999 [p, c]. Runs of under 46,000 steps use less, down to 0.99, to average over the same
#   fraction of the run. The small recipe also keeps queues short, to limit drift: with momentum 0.9 and queues of eight batches, the margin
#   losses fell to a quarter while the shared space collapsed (measured spread: 0.01) [i].
# - MoCo's queue starts with random vectors [c]. Ours starts empty, and empty slots are not negatives, so all terms and their gradients are
#   zero in the first step [i].
# - Keys are normalized by the momentum encoder's running statistics. MoCo shuffles the batch across devices, because BatchNorm statistics
#   shared by a query and its key would distinguish that key from the queue [c]. Running statistics belong to no single batch (as in EMAN,
#   Cai et al. 2021), so a key depends only on its own image, for any slices and ranks [i].
# - P always contains the row's own key; Eq. 4 as printed drops it if a sample has ε tags or fewer [i]. J_tag covers samples with tags,
#   J_cc, J_ic and J_ci samples with a caption, and J_ii all images [p: "doesn't require all images to have tags"]. Texts without an
#   image only contribute to J_cc [i]. Placeholders for missing captions or images do not enter the queues [i].
# - Samples keep their `max_tags` most frequent tags [i]. ε is 2 [p]; in the small recipe, the smallest at which at most 2 % of the queue
#   are positive, since with other tag vocabularies 2 would make almost none or a quarter positive [i].
# - J_ic and J_ci are sums over K = 32,768 (COCO) or 65,536 (Stock) negatives [p]. With fewer, as in a short run or while a queue fills, we
#   use the mean times that number, so that λ keeps its meaning [i].
# - Eq. 7 calls the momentum caption head Φ_ik; it is Φ_ck, the copy of Φ_cq in Eq. 6 [i]. Elsewhere, the subscript of a head names the
#   target modality: q_ic is f_iq and then φ_cq.
# - Heads have two layers, hidden width 2048, ReLU, no BatchNorm, and 128 or 1024 output dimensions [p; no BatchNorm c]. Their inputs are
#   the towers' features: ResNet-50's average pool, 2048-d [p], and the text's start token after the final norm. BERT's pooler is omitted,
#   as it would be a third layer [i]. "Unified" means one head and one queue for all terms of a modality [p].
# - Captions: two different paraphrases of one caption (back-translation through French or German [p]), which the dataset must provide.
#   With a single paraphrase, the original is the second view; with none, it is both [i].
# - With `mct-coco-bert`, the text tower is a pretrained BERT-base with SGD at 4e-5 [p] and without dropout, which would differ between
#   query and key and between the passes over a micro-batch [i]. Otherwise the tower has BERT-base's shape and attention, but CLIP's
#   vocabulary, pre-norm blocks and random initialization: "scratch" (54.6 against 54.9) [p]. SGD at 4e-5 would barely change it, so we
#   use AdamW [i].
# - Images: MoCo-v2's augmentations [p; rates c]. The learning rates decay to 0 on a cosine, without warm-up [p, c].
# - Retrieval and zero-shot use the online towers and inter heads. Parts that no term trains stay at their random initialization.
# - `multi_positive` (ours, off by default): earlier keys of the same sample are not negatives, and in J_cc, J_ic and J_ci neither are keys
#   with the same caption. Without it, a sample is its own negative in a queue larger than the dataset. Keys of the same group
#   (`--group-column`) are never negatives.
