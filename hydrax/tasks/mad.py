"""The six tasks of MAD (arXiv 2403.17844), as a decoder-only language model can be asked them.

recall        pairs of keys and values, the same key always with the same value; noisy: some pairs are noise
fuzzy         the same, keys and values being motifs of one to `motif` tokens
copy          tokens among blanks, a copy sign, then blanks: the tokens again, in their order
compression   tokens, a sign, then blanks: the tokens again. MAD reconstructs each token from the model's one output at
              the sign and the token's place, through a decoder of its own; here the state behind the sign has to do it
memorisation  keys with values that no row shows: they have to be learned by heart
"""

import dataclasses

import numpy as np

from hydrax.core.build import ConfigError, Fraction, NonNegative, Positive
from hydrax.tasks.base import IGNORE, Sample, Task, distinct, repeats


@dataclasses.dataclass(frozen=True)
class Recall(Task):
    """T/2 pairs, the last of a key that was there before.

    Of U = vocabulary - noise_tokens tokens, keys are the first half, values the second. Asked for are the values of
    keys that were there before and, in training, whatever comes next.
    """

    length: Positive = 128  # T
    vocabulary: Positive = 16
    noise_tokens: NonNegative = 0  # the last tokens of the vocabulary
    noise: Fraction = 0.0  # share of the pairs that are two noise tokens
    next_token: bool = True  # training asks for every next token; False: as in evaluation

    def __post_init__(self) -> None:
        if self.length < 4 or self.length % 2:
            raise ConfigError("length", self.length, "expected an even number, 4 or more")
        if self.vocabulary - self.noise_tokens < 2:
            raise ConfigError("noise_tokens", self.noise_tokens, f"expected at most {self.vocabulary - 2}")
        if (self.noise > 0) != (self.noise_tokens > 0):
            raise ConfigError("noise", self.noise, "expected above 0 if and only if there are noise_tokens")

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        """meta: noisy bool [n,T/2], which pairs are noise."""
        usable, pairs = self.vocabulary - self.noise_tokens, self.length // 2
        half = usable // 2
        values = rng.integers(half, usable, (rows, half))  # of every key, in each row
        keys = rng.integers(half, size=(rows, pairs))
        noisy = rng.random((rows, pairs)) < self.noise
        noisy[np.arange(rows), rng.integers(pairs - 1, size=rows)] = False
        noisy[:, -1] = False
        # The last key is one of the different keys before it, all equally likely.
        different = ~repeats(np.where(noisy, -1 - np.arange(pairs), keys)[:, :-1]) & ~noisy[:, :-1]
        chosen = np.where(different, rng.random(different.shape), -1.0).argmax(1)
        keys[:, -1] = keys[np.arange(rows), chosen]
        shown = repeats(np.where(noisy, -1 - np.arange(pairs), keys))
        text = np.stack([keys, np.take_along_axis(values, keys, 1)], axis=2)
        noise = usable + rng.integers(max(self.noise_tokens, 1), size=text.shape)
        text = np.where(noisy[..., None], noise, text).reshape(rows, -1).astype(np.int32)
        targets = np.full_like(text, IGNORE)
        if split == "train" and self.next_token:
            targets[:, :-1] = text[:, 1:]
        else:
            targets[:, ::2] = np.where(shown, text[:, 1::2], IGNORE)
        return {"inputs": text, "targets": targets, "meta": {"noisy": noisy}}


@dataclasses.dataclass(frozen=True)
class FuzzyRecall(Task):
    """Pairs of motifs, of different tokens each, behind padding; the last key was there before.

    Padding is the last token; of the U others, keys are made of the first half, values of the second. A motif has 1 to
    `motif` tokens. Asked for are the values of keys of `motif` tokens (no other key says where it ends) that were there
    before and, in training, whatever comes next.
    """

    length: Positive = 128  # T
    vocabulary: Positive = 16
    motif: Positive = 3  # tokens of a motif at most
    next_token: bool = True  # training asks for every next token; False: as in evaluation

    def __post_init__(self) -> None:
        if self.length < 4 * self.motif:
            raise ConfigError("length", self.length, f"expected at least {4 * self.motif}, two pairs of motifs")
        if (self.vocabulary - 1) // 2 < self.motif:
            raise ConfigError("vocabulary", self.vocabulary, f"expected at least {2 * self.motif + 1} for the motifs")

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        """meta: none."""
        T, K, pairs, row = self.length, self.motif, self.length // 2, np.arange(rows)
        half = (self.vocabulary - 1) // 2
        sizes = rng.integers(1, K, (2, rows, pairs), endpoint=True)  # of keys and values
        keys = distinct(rng, rows * pairs, K, half).reshape(rows, pairs, K)
        values = half + distinct(rng, rows * pairs, K, self.vocabulary - 1 - half).reshape(rows, pairs, K)
        # The last pair repeats one of those behind it that fit into the row however long their motifs are.
        chosen = pairs - 1 - rng.integers(1, T // (2 * K), size=rows)
        sizes[0, row, chosen] = sizes[0, :, -1] = K
        keys[:, -1] = keys[row, chosen]
        keys = np.where(np.arange(K) < sizes[0][..., None], keys, -1)
        first = _first(((keys + 1) * (half + 1) ** np.arange(K)).sum(2))
        values = np.take_along_axis(values, first[..., None], 1)
        values = np.where(np.arange(K) < np.take_along_axis(sizes[1], first, 1)[..., None], values, -1)
        # Laid out from the right; pairs that do not fit whole are left out, and are shown to nobody.
        tokens = np.concatenate([keys, values], axis=2)  # [n,pairs,2K], -1 where there is none
        size = (tokens >= 0).sum(2)
        begin = T - np.cumsum(size[:, ::-1], axis=1)[:, ::-1]
        whole = begin >= 0
        shown = repeats(np.where(whole, first, -1 - np.arange(pairs)))
        asked = (shown & (sizes[0] == K))[..., None] & (np.arange(2 * K) >= K)
        place = begin[..., None] + np.cumsum(tokens >= 0, axis=2) - 1
        r, i, j = np.nonzero((tokens >= 0) & whole[..., None])
        text = np.full((rows, T), self.vocabulary - 1, np.int32)
        text[r, place[r, i, j]] = tokens[r, i, j]
        targets = np.full((rows, T), IGNORE, np.int32)
        if split == "train" and self.next_token:
            targets[:, :-1] = np.where(text[:, :-1] == self.vocabulary - 1, IGNORE, text[:, 1:])
        else:
            r, i, j = np.nonzero(asked & (tokens >= 0))
            targets[r, place[r, i, j] - 1] = tokens[r, i, j]
        return {"inputs": text, "targets": targets, "meta": {}}


@dataclasses.dataclass(frozen=True)
class SelectiveCopy(Task):
    """Tokens among blanks, the copy sign, and blanks at which the tokens are asked for in order.

    The last two tokens of the vocabulary are blank and copy sign. The last of the tokens stands before the sign.
    """

    length: Positive = 256  # T
    vocabulary: Positive = 16
    tokens: Positive = 16

    def __post_init__(self) -> None:
        _check_copy(self.vocabulary)
        if self.length < 2 * self.tokens + 1:
            raise ConfigError("length", self.length, f"expected at least {2 * self.tokens + 1} for the tokens")

    def labels(self, split: str) -> int:
        return self.tokens

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        return copied(rng, rows, self.length, self.tokens, self.vocabulary)


@dataclasses.dataclass(frozen=True)
class Compression(Task):
    """(T-1)/2 tokens, a sign, and as many blanks, at which the tokens are asked for in order."""

    length: Positive = 65  # T
    vocabulary: Positive = 16  # blank and sign included

    def __post_init__(self) -> None:
        _check_copy(self.vocabulary)
        if self.length < 3 or not self.length % 2:
            raise ConfigError("length", self.length, "expected an odd number, 3 or more")

    def labels(self, split: str) -> int:
        return self.length // 2

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        return copied(rng, rows, self.length, self.length // 2, self.vocabulary)


@dataclasses.dataclass(frozen=True)
class Memorisation(Task):
    """Keys, each before the sign V-1, at which the key's value is asked for; the values are in no row."""

    length: Positive = 32  # T
    vocabulary: Positive = 256
    map_seed: NonNegative = 0  # of the values

    def __post_init__(self) -> None:
        if self.length % 2:
            raise ConfigError("length", self.length, "expected an even number")
        if self.vocabulary < 2:
            raise ConfigError("vocabulary", self.vocabulary, "expected at least 2")

    def labels(self, split: str) -> int:
        return self.length // 2

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        """meta: values int32 [n,V-1], the map, the same in every row."""
        sign = self.vocabulary - 1
        values = np.random.Generator(np.random.PCG64(self.map_seed)).integers(sign, size=sign).astype(np.int32)
        inputs = np.full((rows, self.length), sign, np.int32)
        targets = np.full((rows, self.length), IGNORE, np.int32)
        inputs[:, ::2] = rng.integers(sign, size=(rows, self.length // 2))
        targets[:, 1::2] = values[inputs[:, ::2]]
        return {"inputs": inputs, "targets": targets, "meta": {"values": np.broadcast_to(values, (rows, sign))}}


def copied(rng: np.random.Generator, rows: int, length: int, count: int, vocabulary: int) -> Sample:
    """Rows of `count` tokens among blanks, a sign and blanks, the tokens asked for at these."""
    blank, sign = vocabulary - 2, vocabulary - 1
    tokens = rng.integers(blank, size=(rows, count), dtype=np.int32)
    before = rng.integers(count, size=(rows, length - 2 * count - 1))  # the token that a blank is put before
    place = np.arange(count) + np.stack([(before <= j).sum(1) for j in range(count)], axis=1)
    inputs = np.full((rows, length), blank, np.int32)
    np.put_along_axis(inputs, place, tokens, 1)
    inputs[:, length - count - 1] = sign
    targets = np.full((rows, length), IGNORE, np.int32)
    targets[:, -count:] = tokens
    return {"inputs": inputs, "targets": targets, "meta": {}}


def _check_copy(vocabulary: int) -> None:
    if vocabulary < 3:
        raise ConfigError("vocabulary", vocabulary, "expected at least 3: blank, sign and something to copy")


def _first(codes: np.ndarray) -> np.ndarray:
    """int64 [rows, n]: the index of the first entry of its row that each entry equals."""
    order = np.argsort(codes, axis=1, kind="stable")
    ranked = np.take_along_axis(codes, order, 1)
    begins = np.ones(codes.shape, bool)
    begins[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    group = np.maximum.accumulate(np.where(begins, np.arange(codes.shape[1]), 0), axis=1)
    result = np.empty(codes.shape, np.int64)
    np.put_along_axis(result, order, np.take_along_axis(order, group, 1), 1)
    return result
