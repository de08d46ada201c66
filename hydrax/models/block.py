"""One layer: a mixer and an FFN, each reading a norm of the residual stream and adding to it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hydrax import mixers
from hydrax.core import tree
from hydrax.core.typing import Array, Float, PyTree
from hydrax.models.layers import LayerSpec
from hydrax.models.mix import Single
from hydrax.models.sharing import Adapter, Feed
from hydrax.models.spec import ModelConfig
from hydrax.nn.ffn import FFN
from hydrax.nn.linear import Linear
from hydrax.nn.memory import PKM, Workspace
from hydrax.nn.moe import MoE
from hydrax.nn.norm import NORMS, Norm

State = dict[str, Any]
"""What the parts of a layer remember, by part; those that remember nothing are left out."""


class Block(nnx.Module):
    """x ← x + mixer(norm x);  x ← x + ffn(norm x);  with memories, x ← x + memory(norm x) after that.

    Where norms stand, and how much of each term is added, is `LayerSpec.norm_place`:
    pre x + f(norm x), reordered x + norm f(x), sandwich x + norm f(norm x), post α norm x + β f(norm x).
    With two hops (arXiv 2404.08801) the FFN reads the stream after the mixer, but is added to that before it. Mixers
    that norm their input themselves have no norm before them.
    """

    def __init__(
        self, cfg: ModelConfig, spec: LayerSpec, shared: Mapping[str, Any] | None = None, *, depth: int, rngs: nnx.Rngs
    ):
        norm = functools.partial(NORMS[spec.norm], cfg.d_model, axes=("norm",), eps=cfg.norm_eps, rngs=rngs)
        before, after = spec.norm_place != "reordered", spec.norm_place in ("reordered", "sandwich")
        self.name, self.spec = f"{spec.block}", spec
        normed = isinstance(spec.mix, Single) and mixers.get(spec.mix.mixer).NORMS_INPUT
        self.mixer_norm = norm() if before and not normed else None
        self.mixer = spec.mix.build(cfg.d_model, rngs=rngs)
        self.mixer_post_norm = norm() if after else None
        channels = spec.ffn != "none"
        self.ffn_norm = norm() if channels and before else None
        ffn = functools.partial(FFN, cfg.d_model, spec.ffn_dim, spec.ffn, bias=cfg.ffn_bias, rngs=rngs)
        self.ffn = None if spec.ffn_dim is None else ffn()
        self.ffn_post_norm = norm() if channels and after else None
        self.moe = MoE(cfg.d_model, spec.moe, rngs=rngs) if spec.moe is not None else None
        memory = cfg.memory if spec.memory else None
        self.workspace = Workspace(cfg.d_model, memory.workspace, rngs=rngs) if memory and memory.workspace else None
        self.workspace_norm = None if self.workspace is None else norm()
        self.pkm = PKM(cfg.d_model, memory.pkm, rngs=rngs) if memory and memory.pkm else None
        self.pkm_norm = None if self.pkm is None else norm()
        feed, D = spec.feed, cfg.d_model
        self.feed = None if feed is None else Adapter(shared[feed.block], feed, rngs=rngs)
        self.feed_out = None if feed is None else Linear(D, D, axes=("embed", "embed_out"), rngs=rngs)
        # 2·depth terms are added to the stream: their sum keeps the scale of one
        for _, parameter in nnx.to_flat_state(nnx.state(self, nnx.Param)):
            if parameter.get_metadata("residual"):
                parameter[...] = parameter[...] * (2 * depth) ** -0.5

    def __call__(
        self,
        x: Float[Array, "B T D"],
        ctx: mixers.Context,
        state: State | None = None,
        shared: Mapping[str, Any] | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        past, new, entry = self._past(state, ctx), {}, x

        def mix(h: Array) -> Array:
            own = dataclasses.replace(ctx, residual=h if self.spec.norm_place == "post" else entry)
            y, new["mixer"] = self.mixer(h, own, past.get("mixer"))
            return checkpoint_name(y, "mixer_out")

        def channels(h: Array) -> Array:
            return checkpoint_name(self._channels(h, entry, ctx, past, new), "ffn_out")

        with jax.named_scope(self.name):
            x = self._add(x, mix, self.mixer_norm, self.mixer_post_norm, self._fed(x, ctx, past, new, shared))
            if self.spec.ffn != "none":
                x = self._add(x, channels, self.ffn_norm, self.ffn_post_norm, base=entry if self.spec.two_hop else None)
            return self._remember(x, ctx, past, new), new

    def _past(self, state: State | None, ctx: mixers.Context) -> State:
        """The given state, without what another document left; mixers see to their own."""
        if state is None or ctx.starts is None:
            return state or {}
        rest = {name: value for name, value in state.items() if name != "mixer"}
        return {**state, **tree.where(ctx.starts, jax.tree.map(jnp.zeros_like, rest), rest)}

    def _add(
        self,
        x: Array,
        f: Callable[[Array], Array],
        before: Norm | None,
        after: Norm | None,
        fed: Array | None = None,
        base: Array | None = None,
    ) -> Array:
        """The stream after a sublayer, by the rule of `norm_place`; its term joins `base` instead of x if given."""
        h = x if fed is None else x + fed
        h = h if before is None else before(h)
        y = f(h)
        y = y if after is None else after(y)
        if self.spec.norm_place == "post":
            return self.spec.alpha * h + self.spec.beta * y
        return (x if base is None else base) + y

    def _channels(self, h: Array, entry: Array, ctx: mixers.Context, past: State, new: State) -> Array:
        if self.moe is None:
            return self.ffn(h, impl=ctx.impl)
        early = self.moe.cfg.router_at == "pre_attn"
        y, new["ffn"], losses = self.moe(
            h,
            router_input=entry if early else None,
            positions=ctx.positions,
            segment_ids=ctx.segment_ids,
            state=past.get("ffn") or None,
        )
        for name, value in losses.items():
            ctx.record(name, value)
        return y

    def _fed(self, x: Array, ctx: mixers.Context, past: State, new: State, shared: Any) -> Array | None:
        """What the common block adds to the mixer's input."""
        if self.feed is None:
            return None
        common: Feed = self.feed.applied(shared[self.spec.feed.block])
        y, new["feed"] = common(x, ctx, past.get("feed"))
        return self.feed_out(y)

    def _remember(self, x: Array, ctx: mixers.Context, past: State, new: State) -> Array:
        if self.workspace is not None:
            h, facts = self.workspace_norm(x), ctx.places
            y, new["workspace"] = self.workspace(h, **facts, state=past.get("workspace"))
            x = x + y
        return x if self.pkm is None else x + self.pkm(self.pkm_norm(x))

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype, shared: Any = None) -> PyTree:
        """The state before token 0: zeros."""
        state = {"mixer": self.mixer.init_state(batch, max_len, dtype)}
        if self.feed is not None:
            state["feed"] = shared[self.spec.feed.block].mixer.init_state(batch, max_len, dtype)
        if self.moe is not None:
            state["ffn"] = self.moe.init_state(batch, dtype)
        if self.workspace is not None:
            state["workspace"] = self.workspace.init_state(batch, dtype)
        return state
