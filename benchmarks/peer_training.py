"""open_clip's trainer on a small model: prints the processor time of each epoch as JSON, data loading included.

The model is open_clip's CLIP with the towers of one of our model names, its tokenizer with our number of tokens, its transforms, its data
loader for a table, AdamW as in its `main`, and its `train_one_epoch`.

Run: python benchmarks/peer_training.py TABLE --model tiny --image-size 48 --context-length 48 --vocab-size N --precision bf16 --epochs 2
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path

import open_clip
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from open_clip_train import params, train
from open_clip_train.data import get_csv_dataset
from open_clip_train.distributed import init_distributed_device
from timed_training import num_parameters
from torch import nn

from coalign.networks.towers.spec import model_config

PRECISIONS = {"bf16": "amp_bf16", "fp32": "fp32"}  # our name -> open_clip's
SMALLEST_VOCABULARY = 2 * 256 + 2  # bytes inside and at the end of words, start and end tokens


def build_model(name: str, image_size: int, context_length: int, vocab_size: int) -> CLIP:
    config = model_config(name)
    vision, text = dict(config["vision_cfg"], image_size=image_size), dict(config["text_cfg"])
    text.update(context_length=context_length, vocab_size=vocab_size)
    # open_clip's configuration of a timm trunk has no arguments of the trunk
    arguments = vision.pop("timm_kwargs", None)
    trunk = vision.get("timm_model_name")
    placeholder = CLIPVisionCfg(layers=1, width=64, patch_size=16, image_size=image_size)
    model = CLIP(
        config["embed_dim"],
        placeholder if arguments else CLIPVisionCfg(**vision),
        CLIPTextCfg(**text),
        quick_gelu=config.get("quick_gelu", False),
        output_dict=True,
    )
    if arguments:
        body = timm.create_model(trunk, num_classes=0, **arguments)
        model.visual = nn.Sequential(body, nn.Linear(body.num_features, config["embed_dim"], bias=False))
    return model


def build_tokenizer(vocab_size: int, context_length: int) -> SimpleTokenizer:
    """Returns open_clip's tokenizer with the first of its merges."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[: 1 + vocab_size - SMALLEST_VOCABULARY]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "merges.txt.gz"
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write("\n".join(lines))
        tokenizer = SimpleTokenizer(str(path), context_length=context_length)
    assert tokenizer.vocab_size == vocab_size
    return tokenizer


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """Returns open_clip's optimizer, as in its `main`: vectors (norms, biases, class embedding, scale) do not decay."""
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    return torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": args.wd}],
        lr=args.lr,
        betas=(args.beta1, args.beta2),
        eps=args.eps,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="tab-separated, with the columns filepath and title")
    parser.add_argument("--model", required=True)
    for name in ("image-size", "context-length", "vocab-size", "epochs"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", choices=list(PRECISIONS), required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    args = params.parse_args(
        [
            *("--dataset-type", "csv", "--train-data", options.table, "--batch-size", str(options.batch_size)),
            *("--precision", PRECISIONS[options.precision], "--device", "cpu", "--workers", "0", "--model", "ViT-B-32"),
        ]
    )
    args.lr, args.wd, args.skip_scheduler, args.distill, args.wandb = 1e-3, 0.2, True, False, False
    init_distributed_device(args)
    vocab_size = max(options.vocab_size, SMALLEST_VOCABULARY)
    model = build_model(options.model, options.image_size, options.context_length, vocab_size)
    optimizer = build_optimizer(model, args)
    transform = open_clip.image_transform(options.image_size, is_train=True)
    tokenizer = build_tokenizer(vocab_size, options.context_length)
    data = {"train": get_csv_dataset(args, transform, is_train=True, tokenizer=tokenizer)}
    loss = open_clip.create_loss(args)
    seconds = []
    for epoch in range(options.epochs):
        start = time.process_time()
        train.train_one_epoch(model, data, loss, epoch, optimizer, None, None, None, args)
        seconds.append(time.process_time() - start)
    loader = data["train"].dataloader
    values = {
        "pairs": loader.num_batches * options.batch_size, "cpu": seconds,
        "parameters": num_parameters(model),
    }  # fmt: skip
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
