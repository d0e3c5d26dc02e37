"""space(): t-SNE of images, captions and, for a model of one tower, both together, before and after training (OneR, Fig. 4)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from coalign.data.evaluation_views import image_batches
from coalign.data.sources import open_source
from coalign.errors import UserError
from coalign.evaluation.embed import embed_images, embed_texts
from coalign.methods.oner import OneR
from coalign.run.model import Run, build_method, load
from coalign.run.pictures import check_picture, save_picture
from coalign.run.samples import captions_of, select_split


def space(path: str | Path, data: str, out: str | Path, pairs: int = 300, device: str = "cpu") -> dict[str, float]:
    """Writes a picture of `pairs` held-out pairs of `data` in the space of the run as it was initialised, and as it is. Returns the
    distance of the centroids of images and captions, 0 … 2, in both: the modality gap. UserError for what cannot be drawn."""
    from coalign.report.space import space_panels

    out = check_picture(out)
    trained = load(path, device=device)
    initial = replace(
        trained, method=build_method(replace(trained.config, pretrained=None), trained.tokenizer).to(device).eval()
    )
    source = open_source(data)
    indices = select_split(source, data, trained, None)[1]
    captions = captions_of(source)
    chosen = [int(index) for index in np.random.default_rng(0).permutation(indices) if captions(int(index))][:pairs]
    if len(chosen) < 10:
        raise UserError(
            f"{data} has {len(chosen)} held-out pairs, too few for a picture of the space; at least 10 are needed."
        )
    batches = list(image_batches(source, chosen, trained.encoder().image_size))
    texts = [captions(index)[0] for index in chosen]
    panels, gaps = {}, {}
    for name, run in (("before training", initial), ("after training", trained)):
        embeds = _embeds(run, chosen, texts, batches)
        gaps[name] = float(np.linalg.norm(embeds["images"].mean(0) - embeds["captions"].mean(0)))
        panels[f"{name}: centroids {gaps[name]:.2f} apart"] = _in_the_plane(embeds)
    save_picture(space_panels(panels), out)
    return gaps


@torch.no_grad()
def _embeds(run: Run, indices: list[int], texts: list[str], batches: list) -> dict[str, np.ndarray]:
    """Normalised embeds [pair, dim] of every kind of input, of the pairs whose image can be read."""
    images = embed_images(run.encoder(), batches)
    row = {index: number for number, index in enumerate(indices)}
    texts = [texts[row[index]] for index in images.indices]
    found = {"images": images.embeds.numpy(), "captions": embed_texts(run.encoder(), texts).numpy()}
    if isinstance(run.method, OneR) and run.method.has_joint:
        pixels = torch.cat([pixels for _, pixels, _ in batches])
        found["both together"] = F.normalize(run.joint_encoder()(pixels, texts).float(), dim=-1).cpu().numpy()
    return found


def _in_the_plane(embeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    from sklearn.manifold import TSNE

    rows = np.concatenate(list(embeds.values()))
    points = TSNE(perplexity=min(30, len(rows) // 4), metric="cosine", init="pca", random_state=0).fit_transform(rows)
    return dict(zip(embeds, np.split(points, len(embeds))))
