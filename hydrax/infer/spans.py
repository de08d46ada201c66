"""Spans of attention per head, from what a trained model would lose (MoA, arXiv 2406.14909): an offline tool.

A head with the rule (α, β) sees, in rows of N tokens, its own block and those before it, ⌊α/b⌋ + ⌊βN/b⌋ blocks of b
tokens in all, and the first block. `influence` measures what every block is worth on calibration text, `choose` finds
the rules of least loss within a budget, `write` makes the file that `swa` with `pattern="spans"` reads.
"""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core.typing import Array, Float, Int
from hydrax.infer.policy.base import Seen, masked
from hydrax.infer.policy.serve import attending, served_layers, walk
from hydrax.mixers import Context
from hydrax.models.lm import LM

Rule = tuple[float, float]
"""α in tokens, β as a part of the row."""

CERTAIN = 1e-4
"""Least 1 - p that is divided by: a key with all of the weight cannot be dropped."""


def influence(model: LM, tokens: Int[Array, "B T"], *, block: int = 64) -> list[np.ndarray]:
    """Per layer [Hk,N,N]: what dropping a block of keys from a block of queries adds to the loss, to first order.

    It is summed over the pairs of the block and the query heads that share keys.

    Dropping key j of query t leaves p_ti / (1 - p_tj) for the others, which changes the loss by
    p_tj (Σ_i p_ti dp_ti - dp_tj) / (1 - p_tj), dp the derivative of the loss by the weights.
    """
    heads = [(layer.heads, layer.value_dim) for layer in served_layers(model)]
    pushes = [jnp.zeros((*tokens.shape, H, V), jnp.float32) for H, V in heads]

    def loss(pushes: list[Array]) -> tuple[Array, list[tuple]]:
        found: list[Seen] = []

        def attend(seen: Seen, layer: int) -> Array:
            found.append(seen)
            o = masked(seen, seen.visible())
            return o + pushes[layer].astype(o.dtype)

        x, _ = walk(model, tokens, Context.of(tokens), attending(model, attend))
        logits = jax.nn.log_softmax(model.logits(x)[:, :-1, : model.vocabulary])
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)
        return -chosen.mean(), [(seen.q, seen.k, seen.v) for seen in found]

    gradients, seens = jax.jit(jax.grad(loss, has_aux=True))(pushes)
    found = []
    for (q, k, v), do, options in zip(seens, gradients, served_layers(model), strict=True):
        real = jnp.ones(tokens.shape, bool)
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        effects = functools.partial(_effects, options=options, block=block)
        found.append(np.asarray(jax.jit(effects)(q, k, v, at, real, do)))
    return found


def _effects(
    q: Array, k: Array, v: Array, positions: Array, real: Array, do: Array, *, options: Any, block: int
) -> Float[Array, "Hk N N"]:
    """The influence of one layer, block of queries by block of queries."""
    (B, T, H, _), G, N = q.shape, k.shape[2], -(-q.shape[1] // block)
    pad = lambda x: jnp.pad(x, [(0, 0), (0, N * block - T)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    cut = lambda x: jnp.moveaxis(pad(x).reshape(B, N, block, *x.shape[2:]), 1, 0)  # noqa: E731

    def one(rows: tuple) -> Array:
        q, at, real, do = rows
        p = Seen(q, k, v, at, real, options, 1).probabilities()
        values = jnp.repeat(v, H // G, axis=2)
        dp = jnp.einsum("bthv,bshv->bhts", do, values, precision="highest")
        drop = p * ((p * dp).sum(-1, keepdims=True) - dp) / jnp.maximum(1 - p, CERTAIN)
        drop = jnp.pad(drop.sum(2), ((0, 0), (0, 0), (0, N * block - T)))
        return drop.reshape(B, G, H // G, N, block).sum((0, 2, 4))

    return jnp.moveaxis(jax.lax.map(one, tuple(map(cut, (q, positions, real, do)))), 0, 1)


def grid(lengths: Sequence[int], *, step: int = 1024, betas: int = 9, longest: int | None = None) -> list[Rule]:
    """The rules to choose from: α from -min to max of the lengths by `step`, β from 0 to 1.

    Rules whose span is beyond the row at a profiled length, or at the `longest` one to extend to, are left out.
    """
    sizes = [*lengths, longest or max(lengths)]
    alphas = np.arange(-min(lengths), max(lengths) + 1, step)
    rules = [(float(a), float(b)) for a in alphas for b in np.linspace(0, 1, betas)]
    return [(a, b) for a, b in rules if all(0 < a + b * n <= n for n in sizes)]


def kept_blocks(rule: Rule, length: int, block: int) -> np.ndarray:
    """[N,N], the blocks of keys that each block of queries sees."""
    N = -(-length // block)
    span = max(1, int(rule[0] // block) + int(rule[1] * length // block))
    n, m = np.arange(N)[:, None], np.arange(N)
    return (m <= n) & ((n - m < span) | (m == 0))


def choose(
    influences: Mapping[int, Sequence[np.ndarray]], rules: Sequence[Rule], *, block: int = 64, budget: float = 0.5
) -> list[list[Rule]]:
    """A rule for every key head of every layer: the least loss whose mean density is within the budget at every length.

    Each head takes the rule of least loss + Σ λ_N · density_N; λ_N rises while the budget at N is exceeded. What still
    exceeds it is repaired by the changes that cost least per density.

    Args:
      influences: `influence` by profiled length.

    Raises:
      ValueError: no rules fit the budget.
    """
    lengths = sorted(influences)
    masks = {n: np.stack([kept_blocks(rule, n, block) for rule in rules]) for n in lengths}
    density = np.stack([masks[n].sum((1, 2)) / np.tri(masks[n].shape[1]).sum() for n in lengths], axis=1)  # [rules,len]
    loss: Any = 0.0
    for n in lengths:
        heads = np.concatenate([np.asarray(x, np.float64) for x in influences[n]])
        loss = loss + np.einsum("hnm,rnm->hr", heads, ~masks[n])
    chosen = _multipliers(loss, density, budget)
    chosen = _repaired(chosen, loss, density, budget)
    ends = np.cumsum([len(x) for x in influences[lengths[0]]])
    return [[rules[r] for r in own] for own in np.split(chosen, ends[:-1])]


def _multipliers(loss: np.ndarray, density: np.ndarray, budget: float, rounds: int = 200) -> np.ndarray:
    """The best choice [heads] among those of rising multipliers that fits, or the last."""
    scale = np.ptp(loss, axis=1).mean() / max(np.ptp(density, axis=0).min(), 1e-9)
    lam = np.zeros(density.shape[1])
    best, chosen = np.inf, loss.argmin(1)
    for i in range(rounds):
        now = (loss + density @ lam).argmin(1)
        excess = density[now].mean(0) - budget
        total = np.take_along_axis(loss, now[:, None], 1).sum()
        if (excess <= 0).all() and total < best:
            best, chosen = total, now
        lam = np.maximum(lam + scale / np.sqrt(i + 1) * excess, 0)
    return chosen if best < np.inf else now


def _repaired(chosen: np.ndarray, loss: np.ndarray, density: np.ndarray, budget: float) -> np.ndarray:
    """Single changes until the budget holds, cheapest per density first; then those that lower the loss within it."""
    chosen, heads = chosen.copy(), np.arange(len(chosen))
    while True:
        added = loss - loss[heads, chosen][:, None]  # [heads,rules]
        change = (density[None] - density[chosen][:, None]) / len(chosen)  # [heads,rules,lengths]
        excess = density[chosen].mean(0) - budget
        over = np.maximum(excess, 0)
        if over.max() > 1e-12:
            saved = over.sum() - np.maximum(excess + change, 0).sum(-1)
            worth = np.where(saved > 1e-12, added / np.maximum(saved, 1e-12), np.inf)
            if not np.isfinite(worth).any():
                raise ValueError(f"choose: no rules within the budget {budget}")
        else:
            fits = (excess + change <= 1e-12).all(-1)
            worth = np.where(fits & (added < -1e-15), added, np.inf)
            if not np.isfinite(worth).any():
                return chosen
        h, r = np.unravel_index(worth.argmin(), worth.shape)
        chosen[h] = r


def write(path: str | pathlib.Path, layers: Sequence[Sequence[Rule]]) -> None:
    """The file {"layers": [[[α, β], ... key heads], ... layers]}."""
    pathlib.Path(path).write_text(json.dumps({"layers": layers}) + "\n", encoding="utf-8")
