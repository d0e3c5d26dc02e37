"""Folders of tiny pretrained encoders with random weights: of Hugging Face, with a vocabulary of a few words, and of open_clip."""

import json
import math

import torch
from helpers import tiny
from safetensors.torch import save_file

WORDS = [
    "a",
    "the",
    "red",
    "green",
    "blue",
    "gray",
    "thing",
    "of",
    "small",
    "big",
    "square",
    "cafe",
    ",",
    "’",
    "“",
    "##s",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SENTENCES = [
    "A red thing, of the blue",
    "gray squares",
    "nothing known",
    "",
    "Café’s “RED” squares",
    "a\u0301 [MASK] ﬁ",
]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def write_bert(folder, words=WORDS, positions=24, **changes):
    """Writes a BERT with its tokenizer. Returns the folder."""
    import transformers

    tokenizer = _bert_tokenizer(folder, words)
    config = transformers.BertConfig(
        **{**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": positions, **changes}
    )
    return _save(transformers.BertModel(config), tokenizer, folder)


def write_offset(kind, folder, words=WORDS, positions=24):
    """Writes a RoBERTa or MPNet, whose positions start after the index of the padding token, with a tokenizer. Returns the folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*special, *words])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    config_class, model_class = {
        "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
        "mpnet": (transformers.MPNetConfig, transformers.MPNetModel),
    }[kind]
    config = config_class(**SHAPE, vocab_size=len(tokenizer), max_position_embeddings=positions + 2)
    return _save(model_class(config), tokenizer, folder)


def add_pooling(folder, mode="mean_tokens", layers=("Transformer", "Pooling", "Normalize")):
    """Makes the folder one of sentence-transformers. Returns it."""
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    settings = {f"pooling_mode_{name}": name == mode for name in names}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **settings}))
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": paths.get(layer, f"{i}_{layer}"),
            "type": f"sentence_transformers.models.{layer}",
        }
        for i, layer in enumerate(layers)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def _bert_tokenizer(folder, words):
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n")
    return transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"), vocab_file=str(folder / "vocab.txt"))


def _save(model, tokenizer, folder):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # with BERT's initialization, tokens would hardly differ
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_open_clip(folder, scale=None):
    """A folder in open_clip's format, with random weights and CLIP's vocabulary. scale: the logit scale. Returns the folder."""
    import open_clip

    folder.mkdir(parents=True)
    model = {**tiny.MODEL, "text_cfg": {**tiny.MODEL["text_cfg"], "vocab_size": 49408}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    torch.manual_seed(3)
    built = open_clip.CustomTextCLIP(model["embed_dim"], model["vision_cfg"], model["text_cfg"])
    if scale is not None:
        built.logit_scale.data.fill_(math.log(scale))
    save_file(built.state_dict(), folder / "open_clip_model.safetensors")
    return folder
