"""One training step and one evaluation step, as pure functions of plain pytrees."""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hydrax.core import tree
from hydrax.core.typing import Array
from hydrax.models.lm import LM, Blueprint
from hydrax.parallel.rules import constrain
from hydrax.train.loss import Sums, chunked_argmax, chunked_cross_entropy
from hydrax.train.state import State

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
Totals = tuple[Sums, dict[str, Array]]
"""Sums over the predictions, and the layers' own losses by name, times the number of predictions."""

Told = dict[str, Array]
"""What a training step tells its layers beside the batch: `noise` and `progress` of their context."""

NORM_STEPS = 100
"""Steps over which the mean of gradient norms runs."""


def make_train_step(
    plan: Blueprint,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    dtype: jnp.dtype = jnp.float32,
    accumulate: int = 1,
    z_loss: float = 0.0,
    frozen: Collection[str] = (),
    spike: float | None = None,
    steps: int | None = None,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """(state, batch) -> (state, fp32 metrics), to be jitted with the state donated.

    Gradients and counts of `accumulate` microbatches are summed unnormalised and divided once, so the result does
    not depend on how counted tokens are spread. A step is skipped if loss or gradient norm is not finite, or the norm
    is above `spike` times its running mean over `NORM_STEPS` steps: parameters and optimizer stay bit-equal, and only
    `step`, `skipped` and that mean advance; "taken" is then 0. `frozen` parameters count in no norm. Random numbers
    that mixers draw follow from the step alone. `steps` is how many there will be, for mixers that begin otherwise.
    """

    rules = {name: meta.rule for name, meta in plan.meta.items()}

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        told: Told = {"noise": jax.random.split(jax.random.fold_in(jax.random.key(0), state["step"]), accumulate)}
        if steps is not None:
            told["progress"] = jnp.full((accumulate,), state["step"] / steps, jnp.float32)
        grads, (sums, losses) = _accumulated(plan, plan.cast(state["params"], dtype), batch, told, z_loss)
        count = jnp.maximum(sums.tokens, 1.0)
        grads = {name: jnp.zeros_like(g) if name in frozen else g / count for name, g in grads.items()}
        norm, loss = optax.tree.norm([g for name, g in grads.items() if rules[name] == "gradient"]), sums.nll / count
        finite, mean = jnp.isfinite(norm) & jnp.isfinite(loss), state["norm_mean"]
        highest = jnp.inf if spike is None else jnp.where(mean > 0, spike * mean, jnp.inf)
        taken = finite & (norm <= highest)
        # A spike counts as the highest norm allowed, so that the mean follows norms that stay high.
        seen = jnp.minimum(norm, highest)
        moved = jnp.where(mean > 0, mean + (seen - mean) / NORM_STEPS, seen)

        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
        kept = tree.where(taken, new, {"params": state["params"], "opt_state": state["opt_state"]})
        skipped = state["skipped"] + jnp.where(taken, 0, 1)
        counters = {"step": state["step"] + 1, "skipped": skipped, "norm_mean": jnp.where(finite, moved, mean)}
        metrics = {
            "loss": loss,
            **_bits_per_byte(sums, batch),
            "grad_norm": norm,
            "lr": schedule(state["step"] - state["skipped"]),  # updates made so far
            "tokens": sums.tokens,
            "skipped": skipped,
            "taken": taken,
            **{name: value / count for name, value in losses.items()},
        }
        metrics = {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}
        return {**kept, **counters}, metrics

    return step


def make_eval_step(plan: Blueprint, *, dtype: jnp.dtype = jnp.float32) -> Callable[[dict[str, Array], Batch], Metrics]:
    """(params, batch) -> sums {nll, tokens}, without z-loss, and {bytes} of text or the counts of `_counts`."""

    def evaluate(params: dict[str, Array], batch: Batch) -> Metrics:
        model = plan.merge(plan.cast(params, dtype))
        x, targets, weights, _ = _forward(model, batch)
        _, sums = chunked_cross_entropy(x, model.logits, targets, weights)
        known = {"nll": sums.nll, "tokens": sums.tokens}
        if "slices" in batch:
            return {**known, **_counts(chunked_argmax(x, model.logits), batch, plan)}
        return {**known, "bytes": jnp.sum(batch["bytes"])}

    return evaluate


def _counts(said: Array, batch: Batch, plan: Blueprint) -> Metrics:
    """How often the tokens `said` [B,Q] are the targets.

    Sums over rows: of those with targets (rows), of the share of right ones (right) and of rows with all right
    (sequences). By slice [S] (`slices` fp32 [B,S], 1 where a row belongs to a slice): slice_rows and slice_right. By
    target token [V]: class_tokens and class_right.
    """
    weights, targets = batch["weights"], batch["targets"]
    right, asked = weights * (said == targets), jnp.sum(weights, axis=1)
    share = jnp.sum(right, axis=1) / jnp.maximum(asked, 1)
    real = (asked > 0).astype(jnp.float32)
    by_token = functools.partial(jax.ops.segment_sum, num_segments=plan.cfg.vocab_size)
    return {
        "rows": jnp.sum(real),
        "right": jnp.sum(share),
        "sequences": jnp.sum(real * (jnp.sum(right, axis=1) == asked)),
        "slice_rows": real @ batch["slices"],
        "slice_right": share @ batch["slices"],
        "class_tokens": by_token(weights.ravel(), targets.ravel()),
        "class_right": by_token(right.ravel(), targets.ravel()),
    }


def _bits_per_byte(sums: Sums, batch: Batch) -> Metrics:
    """Of text; answers of tasks are not text."""
    if "bytes" not in batch:
        return {}
    return {"bits_per_byte": sums.nll / (math.log(2) * jnp.maximum(jnp.sum(batch["bytes"]), 1.0))}


def _accumulated(
    plan: Blueprint, params: dict[str, Array], batch: Batch, told: Told, z_loss: float
) -> tuple[dict[str, Array], Totals]:
    """Gradients of the summed loss with respect to the cast parameters, in fp32, and its sums.

    `told` has an entry for each of the microbatches into which the batch is cut.
    """

    axes = {name: meta.axes for name, meta in plan.meta.items()}

    def objective(params: dict[str, Array], part: tuple[Batch, Told]) -> tuple[Array, Totals]:
        return _objective(plan, params, *part, z_loss)

    def add(carry: tuple, part: tuple[Batch, Told]) -> tuple[tuple, None]:
        grads, sums = jax.grad(objective, has_aux=True)(params, part)
        grads = {name: constrain(g.astype(jnp.float32), axes[name]) for name, g in grads.items()}
        return jax.tree.map(jnp.add, carry, (grads, sums)), None

    accumulate = len(told["noise"])
    parts = ({name: _microbatches(x, accumulate) for name, x in batch.items()}, told)
    zeros = {name: jnp.zeros(p.shape, jnp.float32) for name, p in params.items()}
    shapes = jax.eval_shape(lambda: objective(params, jax.tree.map(lambda x: x[0], parts))[1])
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, sums), _ = jax.lax.scan(add, (zeros, nothing), parts, unroll=accumulate == 1)
    return grads, sums


def _microbatches(x: Array, n: int) -> Array:
    """[B,...] -> [n,B/n,...], microbatch i holding rows i, i+n, ...: each is spread over all devices."""
    return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)


def _forward(model: LM, batch: Batch, told: Told | None = None) -> tuple[Array, Array, Array, dict[str, Array]]:
    """Hidden states, the targets that they predict, their weights, and the layers' own losses.

    In the order in which the tokens lie on the devices. Where the batch says which places are asked for (`asked` int32
    [B,Q], targets and weights [B,Q]), only those of these places, in their order: with a small model and few answers
    the logits of all others would be most of the work.
    """
    asked, targets, weights = batch.get("asked"), batch["targets"], batch["weights"]
    facts = (batch.get("segment_ids"), batch.get("positions"))
    more: dict[str, Any] = {"modes": batch.get("modes"), **(told or {})}
    x, losses = model.forward(batch["tokens"], *facts, **more, placed=asked is None)
    if asked is not None:
        return jnp.take_along_axis(x, asked[..., None], axis=1), targets, weights, losses
    return x, model.place(targets), model.place(weights), losses


def _objective(
    plan: Blueprint, params: dict[str, Array], batch: Batch, told: Told, z_loss: float
) -> tuple[Array, Totals]:
    """What training minimises, and its parts. The layers' own losses are means, which count as much as all tokens
    together."""
    model = plan.merge(params)
    x, targets, weights, losses = _forward(model, batch, told)
    total, sums = chunked_cross_entropy(x, model.logits, targets, weights, z_loss=z_loss)
    tokens = jax.lax.stop_gradient(sums.tokens)
    losses = {name: value * tokens for name, value in losses.items()}
    return total + sum(losses.values()), (sums, losses)
