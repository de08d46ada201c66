"""What holds for every model, as functions of one: documents, causality, decoding, grouping, training, cache bytes.

A model is a `Case`. Rows have `T` tokens and `segment_ids`; documents begin with the prefix of the model, if it has one.
Modes are random: layers that have none take no notice.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core import tree
from hydrax.core.typing import Array
from hydrax.models import cost, lm
from hydrax.models.spec import BYTE_VOCABULARY, ModelConfig
from hydrax.train.optim import OptimConfig, make_optimizer, make_schedule
from hydrax.train.step import Batch, make_train_step
from tests.contract.cases import inside, segments
from tests.models.small import unstacked
from tests.tolerances import TOLERANCE, assert_close, assert_equal

T = 40
LENGTHS = (7, 1, 20, 9)
S = 24
"""Tokens of the rows that are decoded."""

Params = dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model, and parameters of which none is zero."""

    cfg: ModelConfig
    plan: lm.Blueprint
    params: Params

    @classmethod
    def of(cls, cfg: ModelConfig, seed: int = 0) -> "Case":
        """Matrices keep the scale of what they read; all else is small and random."""
        plan, rng = lm.blueprint(cfg), np.random.default_rng(seed)

        def scale(path: str, shape: tuple[int, ...]) -> float:
            matrix = plan.meta[path].matrix
            return 0.3 if matrix is None else math.prod(shape[i] for i in matrix[0]) ** -0.5

        params = {path: scale(path, s.shape) * rng.standard_normal(s.shape) for path, s in plan.shapes.items()}
        return cls(cfg, plan, {path: jnp.asarray(x, jnp.float32) for path, x in params.items()})

    @property
    def prefix(self) -> int:
        return self.cfg.prefix.meta_tokens

    def tokens(self, seed: int, *shape: int) -> np.ndarray:
        vocabulary = self.cfg.vocab_size or BYTE_VOCABULARY
        return np.random.default_rng(seed).integers(0, vocabulary, shape).astype(np.int32)

    @functools.cached_property
    def logits(self):
        """(params, tokens [B,T], segment_ids, modes) -> logits."""
        return jax.jit(lambda p, tokens, seg, modes: self.plan.merge(p)(tokens, seg, modes=modes))


def modes_of(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(100 + seed).integers(0, 2, shape).astype(np.int32)


def packed_documents_are_separate(case: Case) -> None:
    """A row of documents gives what rows of one document each give; nothing leaks, whatever the mixer."""
    tokens, modes, ends = case.tokens(0, T), modes_of(0, T), np.cumsum(LENGTHS)

    def alone(values: np.ndarray) -> np.ndarray:
        pieces = np.split(values[: ends[-1]], ends[:-1])
        return np.stack([values] + [np.pad(piece, (0, T - len(piece))) for piece in pieces])

    seg = np.stack([segments(LENGTHS, T)] + [segments((n,), T) for n in LENGTHS])
    y = np.asarray(case.logits(case.params, alone(tokens), jnp.asarray(seg), jnp.asarray(alone(modes))))
    for i, n in enumerate(LENGTHS):
        packed = y[0, ends[i] - n : ends[i]]
        assert_close(f"logits of document {i}", packed, y[1 + i, :n], TOLERANCE["fp32_model"])


def the_past_ignores_the_future(case: Case) -> None:
    """Row i has other tokens from its cut on: logits before it stay, those at it do not, all later ones may."""
    cuts = np.array([c for c in (5, 8, 16, 17, T - 1)])
    row, others, modes = case.tokens(1, T), case.tokens(2, T), np.tile(modes_of(1, T), (len(cuts), 1))
    others = np.where(others == row, (row + 1) % BYTE_VOCABULARY, others)
    changed = np.where(np.arange(T) < cuts[:, None], row, others)
    one = jnp.ones((len(cuts), T), jnp.int32)
    y = np.asarray(case.logits(case.params, np.tile(row, (len(cuts), 1)), one, modes))
    other = np.asarray(case.logits(case.params, changed, one, modes))
    for i, cut in enumerate(cuts):
        assert_equal(f"logits before {cut}", other[i, :cut], y[i, :cut])
        assert np.any(other[i, cut] != y[i, cut]), f"logits at {cut} do not depend on their own token"


def decoding_is_training(case: Case, splits: Sequence[int] = range(S + 1)) -> None:
    """Row i prefills `splits[i]` tokens, right-padded, and steps through the others; finished rows step on padding."""
    at = np.array(splits)[:, None]
    index = at + np.arange(S)
    tokens, modes = case.tokens(3, S), modes_of(3, S)
    rest = np.minimum(index, S - 1)

    @jax.jit
    def decode(params: Params, prefix: Array, rest_seg: Array) -> tuple[Array, Array]:
        model = case.plan.merge(params)
        rows = (jnp.tile(x, (len(at), 1)) for x in (tokens, modes))
        first, cache = model.prefill(next(rows), model.init_cache(len(at), S), prefix, modes=next(rows))

        def step(cache: lm.Cache, inputs: tuple[Array, Array, Array]) -> tuple[lm.Cache, Array]:
            logits, cache = model.step(inputs[0], cache, inputs[1], modes=inputs[2])
            return cache, logits

        _, steps = jax.lax.scan(step, cache, (jnp.asarray(tokens[rest].T), rest_seg.T, jnp.asarray(modes[rest].T)))
        return first, jnp.moveaxis(steps, 0, 1)

    for lengths in ((S,), (6, 1, 7, 6, 4)):
        seg = segments(lengths, S)
        # the first document goes on behind the prefix that the cache has seen; those after it bring their own
        front, back = case.prefix, T - S - case.prefix
        row = np.pad(tokens, (front, back)), np.pad(seg, (front, back)), np.pad(modes, (front, back))
        row[1][:front] = 1
        full = case.logits(case.params, *(jnp.asarray(x)[None] for x in row))[0, front : front + S]
        prefix, rest_seg = np.where(np.arange(S) < at, seg, 0), np.where(index < S, seg[rest], 0)
        first, steps = decode(case.params, jnp.asarray(prefix), jnp.asarray(rest_seg))
        for i, s in enumerate(splits):
            assert_close(f"{lengths}: prefill of {s}", first[i, :s], full[:s], TOLERANCE["fp32_model"])
            assert_close(f"{lengths}: steps after {s}", steps[i, : S - s], full[s:], TOLERANCE["fp32_model"])


def cache_bytes_are_priced(case: Case) -> None:
    """What `cost` says is what `init_cache` allocates."""
    for max_len in (3, T):
        cache = jax.eval_shape(lambda p, n=max_len: case.plan.merge(p).init_cache(5, n, jnp.bfloat16), case.params)
        assert tree.nbytes(cache.layers) == cost.cost(case.cfg, seq_len=max_len, batch=5).cache_bytes


def scanned_layers_equal_unrolled_ones(case: Case) -> None:
    """The same logits, however the layers are grouped. Gates of periods are left out: there is one per group."""
    cfg = dataclasses.replace(case.cfg, loop=dataclasses.replace(case.cfg.loop, block_gate=False))
    scanned, unrolled = lm.blueprint(cfg), lm.blueprint(cfg, scan=False)
    params = {path: case.params[path] for path in scanned.shapes}
    own = unstacked(scanned, params)
    assert {path: p.shape for path, p in own.items()} == {path: s.shape for path, s in unrolled.shapes.items()}
    tokens, seg = case.tokens(4, 1, T), jnp.asarray(segments(LENGTHS, T))[None]
    modes = modes_of(4, 1, T)
    y, y_apart = (
        jax.jit(lambda p, plan=plan: plan.merge(p)(tokens, seg, modes=modes))(values)
        for plan, values in ((scanned, params), (unrolled, own))
    )
    assert_close("logits", y_apart, y, TOLERANCE["fp32_model"])


def training_learns(case: Case, optim: OptimConfig, batch: Batch, steps: int = 20) -> None:
    """Steps on one batch, all finite, after which the loss is lower."""
    tx = make_optimizer(optim, steps, case.plan.meta)
    step = make_train_step(case.plan, tx, make_schedule(optim, steps), z_loss=optim.z_loss)
    zero = jnp.zeros((), jnp.int32)
    state = {"params": case.params, "opt_state": tx.init(case.params), "step": zero, "skipped": zero}
    _, metrics = jax.jit(lambda s, b: jax.lax.scan(lambda s, _: step(s, b), s, length=steps))(state, dict(batch))
    bad = {name: x.tolist() for name, x in metrics.items() if not np.isfinite(x).all()}
    assert not bad, bad
    assert metrics["skipped"][-1] == 0
    assert metrics["loss"][-1] < 0.9 * metrics["loss"][0], metrics["loss"].tolist()


def batch_of(case: Case, rows: int = 4) -> dict[str, np.ndarray]:
    """Rows of several documents and padding; every token is to be predicted from the one before it."""
    tokens = case.tokens(5, rows, T + 1)
    seg = np.stack([segments(np.roll(LENGTHS, r), T) for r in range(rows)])
    weights = (seg > 0).astype(np.float32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": seg,
        "positions": inside(seg)[0],
        "weights": weights,
        "bytes": weights.sum(1),
    }
