"""Examples → batches of token ids, in an order that follows from a seed."""

import random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.training.corpus import Example

TRAIN_MAX_TOKENS = 96
MAX_ROWS = 64
# Token ids of a row, and its target.
Encoded = tuple[list[int], float]
Batch = tuple[Tensor, Tensor, Tensor]


def batches(
    examples: list[Example], tokenizer: Tokenizer, batch_tokens: int, rng: random.Random
) -> list[list[Encoded]]:
    """Rows that share a step, in random order: at most `batch_tokens` with their padding, which is little, because they
    are of similar length."""
    encodings = tokenizer.encode_batch([example.text for example in examples])
    rows = [(encoding.ids[:TRAIN_MAX_TOKENS], e.positive) for encoding, e in zip(encodings, examples, strict=True)]
    rows.sort(key=lambda row: len(row[0]) + rng.random() * 3)
    groups: list[list[Encoded]] = [[]]
    for row in rows:
        if groups[-1] and ((len(groups[-1]) + 1) * len(row[0]) > batch_tokens or len(groups[-1]) >= MAX_ROWS):
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    return groups


def collate(group: list[Encoded]) -> Batch:
    """ids int64 [rows, tokens], mask int64 [rows, tokens], target float32 [rows]."""
    longest = max(len(ids) for ids, _ in group)
    ids = torch.zeros(len(group), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, (row_ids, _) in enumerate(group):
        ids[index, : len(row_ids)] = torch.tensor(row_ids)
        mask[index, : len(row_ids)] = 1
    return ids, mask, torch.tensor([target for _, target in group], dtype=torch.float32)
