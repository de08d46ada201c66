"""A model that is run under a policy: prefill and steps like `LM`'s, layer by layer."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError
from hydrax.core.typing import Array, Float, Int, PyTree
from hydrax.infer.policy.base import Policy, Seen
from hydrax.mixers import Context
from hydrax.models import cache as caches
from hydrax.models.block import Block
from hydrax.models.lm import LM
from hydrax.models.stack import Made, Visit, run_period
from hydrax.nn.attention import AttentionConfig
from hydrax.nn.kv_cache import Keys

SERVED = "attn"
"""The mixer whose keys policies choose from."""

Attend = Callable[[Seen, int], Array]
"""Called with what the n-th softmax layer sees, gives its output [B,T,H,V]."""


class Cache(NamedTuple):
    """The state of the model and what the policy remembers, per softmax layer."""

    model: caches.Cache
    memory: list[PyTree]


@dataclasses.dataclass(frozen=True)
class Served:
    """`init_cache`, `prefill` and `step` of a model under a policy, for rows of one document each."""

    model: LM
    policy: Policy

    def init_cache(self, batch: int, max_len: int, dtype: Any = jnp.float32) -> Cache:
        """The state before the first token."""
        layers = served_layers(self.model)
        self.policy.check(layers)
        slots = self.model.cfg.prefix.meta_tokens + max_len
        memory = [self.policy.start(layers, batch, slots) for _ in layers]
        return Cache(self.model.init_cache(batch, max_len, dtype), memory)

    def prefill(
        self, tokens: Int[Array, "B T"], cache: Cache, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T vocab"], Cache]:
        """Logits of tokens that follow the cache, and the cache after them; segment id 0 is padding."""
        ctx = caches.context(cache.model, tokens, segment_ids)
        ctx = dataclasses.replace(ctx, impl=self.model.cfg.impl)
        handed, memory = None, list(cache.memory)

        def attend(seen: Seen, layer: int) -> Array:
            nonlocal handed
            choice = self.policy.select(seen, layer, handed, memory[layer])
            handed, memory[layer] = choice.handed, choice.memory
            return self.policy.attend(seen, choice)

        x, layers = walk(self.model, tokens, ctx, attending(self.model, attend), cache.model.layers)
        logits = self.model.logits(x)[..., : self.model.vocabulary]
        return logits, Cache(caches.advance(cache.model, ctx, layers), memory)

    def step(self, token: Int[Array, "B"], cache: Cache) -> tuple[Float[Array, "B vocab"], Cache]:
        """`prefill` of one token."""
        logits, cache = self.prefill(token[:, None], cache)
        return logits[:, 0], cache


def served_layers(model: LM) -> list[AttentionConfig]:
    """The options of the softmax layers that a policy serves, from the first to the last.

    Raises:
      ConfigError: there are none, the model runs layers several times, a layer reads several times, or the last norm
        has a state.
    """
    if any(section.loops > 1 for section in model.sections):
        raise ConfigError("policy", "loop", "expected a model without loops")
    if model.cfg.final_norm is not None:
        raise ConfigError("policy", model.cfg.final_norm, "expected a model whose last norm has no state")
    layers = [layer for section in model.sections for layer in section.layers]
    found: list[Any] = [s.options for layer in layers for s in layer.mix.singles() if s.mixer == SERVED]
    if not found:
        raise ConfigError("policy", model.cfg.pattern, f"expected a model with {SERVED} layers")
    hops = next((layer.hops for layer in found if layer.hops is not None), None)
    if hops is not None:
        raise ConfigError("policy", f"hops = {hops}", f"expected {SERVED} layers without hops")
    return found


def walk(
    model: LM, tokens: Int[Array, "B T"], ctx: Context, visit: Visit, states: list | None = None
) -> tuple[Float[Array, "B T D"], list]:
    """The normed stream after the last layer, and the states of all layers, which are run one by one."""
    x, ctx = model.enter(tokens, ctx)
    made: Made = {}
    new = []
    for i, (group, period) in enumerate(zip(model.groups, model.periods, strict=True)):
        graph, params = nnx.split(period)
        after = []
        for r in range(group.repeats):
            own = nnx.merge(graph, jax.tree.map(lambda p, r=r: p[r], params))
            given = None if states is None else jax.tree.map(lambda s, r=r: s[0, r], states[i])
            run = run_period(group, own, x, ctx, r, given, shared=model.shared, made=made, visit=visit)
            x, made = run.x, made | run.made
            after.append(run.states)
        new.append(jax.tree.map(lambda *s: jnp.stack(s)[None], *after))
    return model.finish(x, ctx)[0], new


def attending(model: LM, attend: Attend) -> Visit:
    """Has `attend` in place of the attention of every softmax layer that a policy serves."""
    layers, count = served_layers(model), 0

    def instead(q: Array, keys: Keys, *, positions: Array, segment_ids: Array | None, **_: Any) -> Array:
        nonlocal count
        real = jnp.ones(positions.shape, bool) if segment_ids is None else segment_ids != 0
        k, v = _in_order(keys, positions.shape[1])
        seen = Seen(q, k, v, positions, real, layers[count], len(layers))
        count += 1
        return attend(seen, count - 1)

    def visit(block: Block, x: Array, ctx: Context) -> Context:
        return dataclasses.replace(ctx, attend=instead)

    return visit


def _in_order(keys: Keys, new: int) -> tuple[Array, Array]:
    """Keys and values by position: those of a cache stand before the `new` ones."""
    if keys.positions is None or keys.segment_ids is None:
        return keys.k, keys.v
    slots = keys.k.shape[1] - new
    at = jnp.where(keys.segment_ids != 0, keys.positions, slots)

    def placed(x: Array) -> Array:
        empty = jnp.zeros((x.shape[0], slots, *x.shape[2:]), x.dtype)
        return jax.vmap(lambda e, i, n: e.at[i].set(n, mode="drop"))(empty, at, x)

    return placed(keys.k), placed(keys.v)
