"""One training step and one evaluation step, as pure functions of plain pytrees."""

import math
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import optax

from hydrax.core import tree
from hydrax.core.typing import Array
from hydrax.models.lm import Blueprint
from hydrax.parallel.rules import constrain
from hydrax.train.loss import Sums, chunked_cross_entropy
from hydrax.train.state import State

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
Totals = tuple[Sums, dict[str, Array]]
"""Sums over the predictions, and the layers' own losses by name, times the number of predictions."""

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
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """(state, batch) -> (state, fp32 metrics), to be jitted with the state donated.

    Gradients and counts of `accumulate` microbatches are summed unnormalised and divided once, so the result does
    not depend on how counted tokens are spread. A step is skipped if loss or gradient norm is not finite, or the norm
    is above `spike` times its running mean over `NORM_STEPS` steps: parameters and optimizer stay bit-equal, and only
    `step`, `skipped` and that mean advance; "taken" is then 0. `frozen` parameters count in no norm.
    """

    rules = {name: meta.rule for name, meta in plan.meta.items()}

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        grads, (sums, losses), bytes_ = _accumulated(plan, plan.cast(state["params"], dtype), batch, accumulate, z_loss)
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
            "bits_per_byte": sums.nll / (math.log(2) * jnp.maximum(bytes_, 1.0)),
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
    """(params, batch) -> sums {nll, tokens, bytes}; z-loss is not part of it."""

    def evaluate(params: dict[str, Array], batch: Batch) -> Metrics:
        sums, _ = _objective(plan, plan.cast(params, dtype), batch, 0.0)[1]
        return {"nll": sums.nll, "tokens": sums.tokens, "bytes": jnp.sum(batch["bytes"])}

    return evaluate


def _accumulated(
    plan: Blueprint, params: dict[str, Array], batch: Batch, accumulate: int, z_loss: float
) -> tuple[dict[str, Array], Totals, Array]:
    """Gradients of the summed loss with respect to the cast parameters, in fp32; its sums; counted bytes."""

    axes = {name: meta.axes for name, meta in plan.meta.items()}

    def objective(params: dict[str, Array], part: Batch) -> tuple[Array, Totals]:
        return _objective(plan, params, part, z_loss)

    def add(carry: tuple, part: Batch) -> tuple[tuple, None]:
        grads, sums = jax.grad(objective, has_aux=True)(params, part)
        grads = {name: constrain(g.astype(jnp.float32), axes[name]) for name, g in grads.items()}
        return jax.tree.map(jnp.add, carry, (grads, sums)), None

    parts = {name: _microbatches(x, accumulate) for name, x in batch.items()}
    zeros = {name: jnp.zeros(p.shape, jnp.float32) for name, p in params.items()}
    shapes = jax.eval_shape(lambda: objective(params, jax.tree.map(lambda x: x[0], parts))[1])
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, sums), _ = jax.lax.scan(add, (zeros, nothing), parts, unroll=accumulate == 1)
    return grads, sums, jnp.sum(batch["bytes"])


def _microbatches(x: Array, n: int) -> Array:
    """[B,...] -> [n,B/n,...], microbatch i holding rows i, i+n, ...: each is spread over all devices."""
    return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)


def _objective(plan: Blueprint, params: dict[str, Array], batch: Batch, z_loss: float) -> tuple[Array, Totals]:
    """What training minimises, and its parts. The layers' own losses are means, which count as much as all tokens
    together."""
    model = plan.merge(params)
    x, losses = model.forward(
        batch["tokens"], batch.get("segment_ids"), batch.get("positions"), modes=batch.get("modes"), placed=True
    )
    targets, weights = model.place(batch["targets"]), model.place(batch["weights"])
    total, sums = chunked_cross_entropy(x, model.logits, targets, weights, z_loss=z_loss)
    tokens = jax.lax.stop_gradient(sums.tokens)
    losses = {name: value * tokens for name, value in losses.items()}
    return total + sum(losses.values()), (sums, losses)
