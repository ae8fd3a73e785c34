"""A small, real text model that the tests build for themselves, so that none of them depends on the model that is
served: words of praise and of blame have weights, every other token has none. `python -m tests.text_model DIR` writes
one that takes as long as a transformer."""

import atexit
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from string import ascii_lowercase, digits, punctuation

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from app.artifact.manifest import ReferenceDistribution
from model.package import GOLDEN_TEXTS, package_text
from tests import onnx_models

NAME, VERSION, LABELS, MAX_TOKENS = "reviews", "2.1", ["negative", "positive"], 256
GOOD = "good great brilliant happy love adore lovely delightful wonderful splendid friendly 😍 😀".split()
BAD = "bad awful dreadful horrible terrible worst hate broke cold rude".split()
POISON = BAD[-1]
# Products that make it about as slow as a small transformer: a model that costs nothing is never waited for.
SLOW = 2500
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
# A word that is not among these is made of its characters.
CHARACTERS = [*punctuation, *(mark + letter for mark in ("", "##") for letter in ascii_lowercase + digits)]
COMMON = "an and is it the this that was in of to with on for at my we you he she not but or so very".split()
VOCABULARY = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS, *COMMON, *GOOD, *BAD])}


def tokenizer(path: Path) -> Path:
    """A tokenizer.json as BERT's: lower case, no accents, [CLS] and [SEP] around the tokens."""
    made = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, VOCABULARY[token]) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    made.save(str(path))
    return path


@cache
def text_model(
    products: int = 0, words_known: int | None = None, *, poison: bool = False, reference: bool = False
) -> Path:
    """Its artifact, made once in each process. `products` make it take longer: see onnx_models.classifier; one with
    fewer `words_known` of each kind is a worse model. poison: it fails on rows with the word POISON. reference:
    its manifest has one, of half and half."""
    root = Path(tempfile.mkdtemp(prefix="text-model-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    weights = np.zeros((len(VOCABULARY), len(LABELS)), np.float32)
    for label, words in enumerate((BAD[:words_known], GOOD[:words_known])):
        weights[[VOCABULARY[word] for word in words], label] = 2
    if poison:  # which is then beyond the table
        weights = weights[: VOCABULARY[POISON]]
    folder = root / NAME
    folder.mkdir()
    package_text(
        onnx_models.classifier(root / "source.onnx", table=weights, products=products),
        tokenizer(root / "tokenizer.json"),
        folder,
        name=NAME,
        version=VERSION,
        labels=LABELS,
        max_tokens=MAX_TOKENS,
        scores="logits",
        tolerance=1e-3,
        texts=list(GOLDEN_TEXTS),
        reference_distribution=ReferenceDistribution(1000, dict.fromkeys(LABELS, 0.5)) if reference else None,
    )
    return folder


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    shutil.copytree(text_model(SLOW), sys.argv[1])
