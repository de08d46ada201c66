"""What a policy misses: the mass of the keys it keeps, and the error of every layer and of the model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core.build import ConfigError
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, ArrayLike, Float, Int
from hydrax.infer.policy.base import Choice, Policy, Seen, masked
from hydrax.infer.policy.serve import Attend, attending, served_layers, walk
from hydrax.mixers import Context
from hydrax.models.lm import LM


@dataclasses.dataclass(frozen=True)
class Report:
    """Of one policy against full attention, over all real tokens; per softmax layer, from first to last.

    Attributes:
      recall: mean over heads and queries of Σ p over the kept keys, p the weights of full attention.
      error: rms(o_policy - o_full) / rms(o_full) of the heads' outputs, given what layers read under full attention.
      density: kept keys over visible ones.
      logits: the same error of the logits, of the model that runs under the policy.
      loss, full_loss: mean nats per next token, under the policy and in full.
    """

    recall: list[float]
    error: list[float]
    density: list[float]
    logits: float
    loss: float
    full_loss: float


def report(
    model: LM,
    tokens: Int[ArrayLike, "B T"],
    policy: Policy,
    segment_ids: ArrayLike | None = None,
    *,
    rows_at_once: int | None = None,
    advance: Callable[[int], Any] | None = None,
) -> Report:
    """The report on rows of one document each; segment id 0 is padding.

    All scores [B,H,T,T] of a layer are formed, for `rows_at_once` rows at a time. `advance` is told how many are done.

    Raises:
      ConfigError: a row of several documents, of which policies know nothing, or a model that the policy does not suit.
    """
    policy.check(served_layers(model))
    tokens = np.asarray(tokens)
    ids = np.ones(tokens.shape, np.int32) if segment_ids is None else np.asarray(segment_ids)
    for i, row in enumerate(ids):
        if (number := len(np.unique(row[row != 0]))) > 1:
            raise ConfigError("segment_ids", f"{number} documents in row {i}", "expected one in each row")
    size = min(rows_at_once or len(tokens), len(tokens))
    run = jax.jit(lambda *x: _run(model, policy, *x))
    total: Any = None
    for start in range(0, len(tokens), size):
        own = [_filled(x[start : start + size], size) for x in (tokens, ids)]
        sums = jax.device_get(run(*own))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        if advance is not None:
            advance(min(size, len(tokens) - start))
    layers, whole = total
    return Report(
        recall=[float(s["recalled"] / s["queries"]) for s in layers],
        error=[_root(s) for s in layers],
        density=[float(s["kept"] / s["visible"]) for s in layers],
        logits=_root(whole),
        loss=float(whole["loss"] / whole["targets"]),
        full_loss=float(whole["full_loss"] / whole["targets"]),
    )


def _run(model: LM, policy: Policy, tokens: Array, segment_ids: Array) -> tuple[list[dict], dict[str, Array]]:
    """Sums over real tokens: of every layer, and of the logits."""
    layers = served_layers(model)
    memory = [policy.start(layers, *tokens.shape) for _ in layers]
    facts: list[dict[str, Array]] = []
    handed: Any = None

    def choose(seen: Seen, layer: int) -> Choice:
        nonlocal handed
        choice = policy.select(seen, layer, handed, memory[layer])
        handed = choice.handed
        return choice

    def measured(seen: Seen, layer: int) -> Array:
        choice, full = choose(seen, layer), masked(seen, seen.visible())
        facts.append(_facts(seen, choice.kept, policy.attend(seen, choice), full))
        return full

    def logits(attend: Attend) -> Array:
        nonlocal handed
        handed = None
        x, _ = walk(model, tokens, Context.of(tokens, segment_ids), attending(model, attend))
        return model.logits(x)[..., : model.vocabulary]

    full, under = logits(measured), logits(lambda seen, layer: policy.attend(seen, choose(seen, layer)))
    real = segment_ids != 0
    losses = {"loss": _loss(under, tokens, real), "full_loss": _loss(full, tokens, real), "targets": real[:, 1:].sum()}
    return facts, losses | _squares(under, full, real[..., None])


def _facts(seen: Seen, kept: Array, o: Array, full: Array) -> dict[str, Array]:
    visible, p = seen.visible(), seen.probabilities()
    kept = jnp.broadcast_to(kept & visible, p.shape)
    return {
        "recalled": jnp.where(kept, p, 0).sum(),
        "queries": seen.real.sum() * p.shape[1],
        "kept": kept.sum(dtype=jnp.float32),
        "visible": visible.sum(dtype=jnp.float32) * p.shape[1],
        **_squares(o, full, seen.real[..., None, None]),
    }


def _squares(actual: Array, expected: Array, real: Array) -> dict[str, Array]:
    a, e = (jnp.where(real, fp32(x), 0) for x in (actual, expected))
    return {"missed": jnp.square(a - e).sum(), "size": jnp.square(e).sum()}


def _root(sums: dict[str, Any]) -> float:
    return float(np.sqrt(sums["missed"] / max(sums["size"], 1e-30)))


def _loss(logits: Float[Array, "B T vocab"], tokens: Array, real: Array) -> Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.where(real[:, 1:], chosen, 0).sum()


def _filled(x: np.ndarray, rows: int) -> np.ndarray:
    """Rows of zeros, which are padding, up to the number that is compiled."""
    return np.pad(x, ((0, rows - len(x)), (0, 0)))
