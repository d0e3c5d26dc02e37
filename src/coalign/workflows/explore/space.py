"""space(): t-SNE of image, caption and, for OneR, joint embeddings, before and after training (OneR, Fig. 4)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from coalign.data.loading.eval import image_batches
from coalign.devices import best_device
from coalign.errors import UserError
from coalign.evaluation.embed import embed_images, embed_joint, embed_texts
from coalign.progress import waiting
from coalign.runs.run import Run, build_method, load
from coalign.workflows.evaluate.samples import captions_of, open_as_trained, select_split
from coalign.workflows.image_files import check_figure_path, save_figure


def space(
    path: str | Path,
    data: str,
    out: str | Path,
    pairs: int = 300,
    device: str | None = None,
    similarity: str | None = None,
) -> dict[str, float]:
    """Plots the embeddings of `pairs` held-out pairs of `data` by the run's model at random initialization and after training.

    similarity: of a run whose method has several, as in `load`; the plot needs one vector per sample, compared by its cosine.

    Returns the modality gap of both, the distance between the centroids of images and captions, 0 to 2. Raises UserError if there are
    fewer than 10 pairs, the model does not embed a sample as one vector, or the run or the data cannot be read.
    """
    from coalign.report.embedding_space import space_panels

    out = check_figure_path(out)
    device = best_device(device)
    trained = load(path, device=device, similarity=similarity)
    if not trained.encoder().compares_cosines:
        several = hasattr(trained.config.method_config, "similarity")
        raise UserError(
            f"{path} does not compare one vector per sample, which the plot needs"
            + ("; pass --similarity projector." if several else ".")
        )
    untrained_method = build_method(trained.config, trained.tokenizer, trained.path)
    initial = replace(trained, method=untrained_method.to(device).eval())
    source = open_as_trained(data, trained)
    indices = select_split(source, data, trained, None)[1]
    captions = captions_of(source)
    pair_indices = [int(index) for index in np.random.default_rng(0).permutation(indices) if captions(int(index))][
        :pairs
    ]
    if len(pair_indices) < 10:
        raise UserError(
            f"{data} has {len(pair_indices)} held-out pairs, too few to plot their embeddings; at least 10 are needed."
        )
    encoder = trained.encoder()
    batches = list(image_batches(source, pair_indices, encoder.image_size, preprocess=encoder.preprocess))
    texts = [captions(index)[0] for index in pair_indices]
    panels, gaps = {}, {}
    for name, run in (("before training", initial), ("after training", trained)):
        embeds = _embeds(run, pair_indices, texts, batches)
        gaps[name] = float(np.linalg.norm(embeds["images"].mean(0) - embeds["captions"].mean(0)))
        panels[f"{name}: modality gap {gaps[name]:.2f}"] = _project_to_2d(embeds)
    save_figure(space_panels(panels), out)
    return gaps


def _embeds(run: Run, indices: list[int], texts: list[str], batches: list) -> dict[str, np.ndarray]:
    """Returns normalized embeds [pair, dim] of images, captions and, for OneR, both jointly, for the pairs with a readable image."""
    images = embed_images(run.encoder(), batches, total=len(indices))
    row = {index: number for number, index in enumerate(indices)}
    texts = [texts[row[index]] for index in images.indices]
    embeds = {"images": images.embeds.numpy(), "captions": embed_texts(run.encoder(), texts).numpy()}
    if run.method.has_joint:
        pixels = torch.cat([pixels for _, pixels, _ in batches])
        embeds["joint"] = embed_joint(run.encoder(), run.joint_encoder(), pixels, texts).numpy()
    return embeds


def _project_to_2d(embeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    from sklearn.manifold import TSNE

    rows = np.concatenate(list(embeds.values()))
    tsne = TSNE(perplexity=min(30, len(rows) // 4), metric="cosine", init="pca", random_state=0)
    with waiting(f"t-SNE of {len(rows):,} embeddings"):
        points = tsne.fit_transform(rows)
    return dict(zip(embeds, np.split(points, len(embeds))))
