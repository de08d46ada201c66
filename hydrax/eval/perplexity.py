"""Loss, perplexity and bits per byte of text, and how much of it is in what the text itself has shown before.

Text is cut into sequences of the training length, each read from a fresh state, as in validation. The slices are those
of arXiv 2312.04927: a target is a recall hit if the n-gram that it completes (n = 2 in the paper) occurred earlier in
its sequence, and at most `RARE` times in the training split, so that it cannot have been learnt by heart.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hydrax.core.typing import Bool, Int
from hydrax.data.tokenizer import Tokenizer
from hydrax.eval.scoring import Score, Tokens

RARE = 1250
"""Occurrences in the training split beyond which an n-gram is no recall hit."""

FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd, of the polynomial modulo 2^64 that an n-gram is known by."""

SLICES = ("hits", "others")


def perplexity(sequences: Sequence[Tokens], scores: Sequence[Score], tokenizer: Tokenizer) -> dict[str, Any]:
    """Mean nats per target and what follows from it; the standard error is that over sequences."""
    nll, sizes = np.array([s.nll.sum(dtype=np.float64) for s in scores]), np.array([len(s.nll) for s in scores])
    size = sum(int(tokenizer.token_bytes[sequence[1:]].sum()) for sequence in sequences)
    loss = nll.sum() / sizes.sum()
    spread = np.sqrt(np.square(nll - loss * sizes).sum() * len(nll) / max(len(nll) - 1, 1)) / sizes.sum()
    return {
        "loss": loss,
        "stderr": spread if len(nll) > 1 else None,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nll.sum() / math.log(2) / size if size else None,
        "tokens": int(sizes.sum()),
        "bytes": size,
        "sequences": len(sequences),
    }


def recall_slices(
    sequences: Sequence[Tokens], scores: Sequence[Score], training: Iterable[Tokens], order: int = 2
) -> dict[str, Any]:
    """The loss on recall hits and on all other targets, their numbers, and the accuracy of the likeliest token."""
    codes = [ngrams(sequence, order) for sequence in sequences]
    seen = [seen_before(code) for code in codes]
    wanted = np.unique(np.concatenate([code[old] for code, old in zip(codes, seen, strict=True)]))
    often = np.zeros(len(wanted), np.int64)
    for document in training:
        often += _occurrences(wanted, ngrams(document, order))
    frequent = wanted[often > RARE]
    hits = []
    for sequence, code, old in zip(sequences, codes, seen, strict=True):
        hit = np.zeros(len(sequence) - 1, bool)
        hit[len(hit) - len(code) :] = old & ~np.isin(code, frequent)  # the first targets complete no n-gram
        hits.append(hit)
    hit, nll, right = (np.concatenate(part) for part in (hits, *zip(*scores, strict=True)))
    result: dict[str, Any] = {"order": order, "rare": RARE}
    for name, members in zip(SLICES, (hit, ~hit), strict=True):
        count = int(members.sum())
        result[name] = {
            "loss": nll[members].mean(dtype=np.float64) if count else None,
            "accuracy": right[members].mean(dtype=np.float64) if count else None,
            "targets": count,
            "share": count / len(hit),
        }
    return result


def ngrams(tokens: Tokens, order: int) -> Int[np.ndarray, "N"]:
    """A number per n-gram [max(T - order + 1, 0)], by its last token; other n-grams have others (but for 1 in 2^64)."""
    code = np.zeros(max(len(tokens) - order + 1, 0), np.uint64)
    for i in range(order):
        code = code * FACTOR + tokens[i : i + len(code)].astype(np.uint64) + np.uint64(1)
    return code


def seen_before(codes: np.ndarray) -> Bool[np.ndarray, "N"]:
    """Whether each number occurred earlier."""
    _, first, which = np.unique(codes, return_index=True, return_inverse=True)
    return first[which] < np.arange(len(codes))


def _occurrences(wanted: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """How often each of the sorted numbers `wanted` occurs."""
    at = np.searchsorted(wanted, codes)
    found = at[wanted[np.minimum(at, len(wanted) - 1)] == codes] if len(wanted) else at[:0]
    return np.bincount(found, minlength=len(wanted))
