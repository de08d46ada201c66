"""What a policy misses: the mass of the keys it keeps, and the error of every layer and of the model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array, Float, Int
from hydrax.infer.policy.base import Policy, Seen, masked, relative_error
from hydrax.infer.policy.serve import attending, served_layers, walk
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


def report(model: LM, tokens: Int[Array, "B T"], policy: Policy, segment_ids: Array | None = None) -> Report:
    """The report on rows of one document each; segment id 0 is padding."""
    policy.check(served_layers(model))
    layers, full, under = jax.jit(lambda *x: _run(model, policy, *x))(tokens, segment_ids)
    real = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
    numbers = {name: [float(layer[name]) for layer in layers] for name in ("recall", "error", "density")}
    return Report(
        **numbers,
        logits=float(relative_error(under, full, real[..., None])),
        loss=float(_loss(under, tokens, real)),
        full_loss=float(_loss(full, tokens, real)),
    )


def _run(model: LM, policy: Policy, tokens: Array, segment_ids: Array | None) -> tuple[list[dict], Array, Array]:
    """Facts of every layer, and the logits of full attention and under the policy."""
    layers = served_layers(model)
    memory = [policy.start(layers, *tokens.shape) for _ in layers]
    facts: list[dict[str, Array]] = []
    handed: dict[str, Any] = {}

    def choose(seen: Seen, layer: int) -> Any:
        choice = policy.select(seen, layer, handed.get("now"), memory[layer])
        handed["now"] = choice.handed
        return choice

    def measured(seen: Seen, layer: int) -> Array:
        choice = choose(seen, layer)
        o = masked(seen, seen.visible())
        facts.append(_facts(seen, choice.kept, policy.attend(seen, choice), o))
        return o

    def logits(attend: Any) -> Array:
        handed.clear()
        x, _ = walk(model, tokens, Context.of(tokens, segment_ids), attending(model, attend))
        return model.logits(x)[..., : model.vocabulary]

    return facts, logits(measured), logits(lambda seen, layer: policy.attend(seen, choose(seen, layer)))


def _facts(seen: Seen, kept: Array, o: Array, full: Array) -> dict[str, Array]:
    visible, p = seen.visible(), seen.probabilities()
    kept = jnp.broadcast_to(kept & visible, p.shape)
    queries = seen.real.sum() * p.shape[1]
    return {
        "recall": jnp.where(kept, p, 0).sum() / queries,
        "density": kept.sum() / (visible.sum() * p.shape[1]),
        "error": relative_error(o, full, seen.real[..., None, None]),
    }


def _loss(logits: Float[Array, "B T vocab"], tokens: Array, real: Array) -> Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.where(real[:, 1:], chosen, 0).sum() / real[:, 1:].sum()
