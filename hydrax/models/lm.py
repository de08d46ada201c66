"""The language model: embedding, layers, final norm, logits; and its blueprint, which holds no arrays."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrax import mixers
from hydrax.core.build import ConfigError
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int, PyTree
from hydrax.models.block import Block
from hydrax.models.cache import Cache, advance, context
from hydrax.models.layers import Group, LayerSpec, Section, groups
from hydrax.models.sharing import Feed
from hydrax.models.spec import BYTE_VOCABULARY, ModelConfig, model_config, sections
from hydrax.models.stack import REMAT, Losses, Made, Passes, Period, added, init_group, run_group, variant
from hydrax.nn.bounds import LowerBounds
from hydrax.nn.embed import Embedding
from hydrax.nn.norm import NORMS, Norm
from hydrax.nn.param import param
from hydrax.nn.timestep_norm import TimestepNorm
from hydrax.parallel.rules import constrain
from hydrax.parallel.shards import Shards, place, restore, strategies


class LM(nnx.Module):
    """A causal language model over any pattern of mixers.

    Computation runs in the dtype of the embedding table (see `Blueprint.cast`); logits are fp32.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        remat: str = "none",
        unroll: int = 1,
        scan: bool = True,
        strategy: str | None = None,
        layout: str = "contiguous",
        key: Array,
    ):
        self.cfg, self.remat, self.unroll = cfg, remat, unroll
        self.strategies, self.layout = strategies(strategy), layout
        self.sections = sections(cfg)
        layers = [layer for section in self.sections for layer in section.layers]
        self.depth = len(layers)
        self.groups = [group for section in self.sections for group in groups(section, scan=scan)]
        self.vocabulary = cfg.vocab_size or BYTE_VOCABULARY
        rngs = nnx.Rngs(params=jax.random.fold_in(key, self.depth))
        self.embed = Embedding(self.vocabulary, cfg.d_model, rngs=rngs)
        self.head = None if cfg.tie else Embedding(self.vocabulary, cfg.d_model, rngs=rngs)
        self.norm: Norm | TimestepNorm = _final_norm(cfg, rngs)
        widths = dict.fromkeys(width for layer in layers for width in layer.mix.lower_bounds())
        self.bounds = nnx.List([LowerBounds(self.depth, width, rngs=rngs) for width in widths])
        meta, normal = cfg.prefix.meta_tokens, jax.nn.initializers.normal(0.02)
        self.meta = param(rngs, normal, (meta, cfg.d_model), ("prefix", "embed"), cast=True) if meta else None
        self.passes = nnx.List([Passes(cfg.loop, section.loops, cfg.d_model, rngs=rngs) for section in self.sections])
        self.shared = nnx.Dict(self._common(layers, rngs))
        self.periods = nnx.List([init_group(g, cfg, self.shared, depth=self.depth, key=key) for g in self.groups])

    def _common(self, layers: list[LayerSpec], rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """The blocks that several layers use, by name."""
        fed = {layer.feed.block: Feed(self.cfg, layer.feed, rngs=rngs) for layer in layers if layer.feed is not None}
        own = {layer.block: layer for layer in layers if layer.shared}
        return fed | {name: Block(self.cfg, layer, fed, depth=self.depth, rngs=rngs) for name, layer in own.items()}

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Array | None = None,
        positions: Array | None = None,
        *,
        modes: Array | None = None,
    ) -> Float[Array, "B T vocab"]:
        """Logits of the next token after each token. `segment_ids` keep packed documents apart (0 = padding)."""
        return self.logits(self.hidden(tokens, segment_ids, positions, modes=modes))[..., : self.vocabulary]

    def hidden(
        self, tokens: Int[Array, "B T"], segment_ids: Array | None = None, positions: Array | None = None, **facts: Any
    ) -> Float[Array, "B T D"]:
        """The normed residual stream after the last layer; see `forward`."""
        return self.forward(tokens, segment_ids, positions, **facts)[0]

    def forward(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Array | None = None,
        positions: Array | None = None,
        *,
        modes: Array | None = None,
        noise: Array | None = None,
        progress: Array | None = None,
        impl: str | None = None,
        taps: Mapping[str, Callable[[Array], Array]] | None = None,
        placed: bool = False,
    ) -> tuple[Float[Array, "B T D"], Losses]:
        """The normed residual stream after the last layer, and the layers' own losses, summed by name.

        Arguments are in the order of the row, and so is the result, for which devices that share rows in another
        layout exchange it; `placed`: it stays where it is, in the order of `place`.

        `positions` follow from `segment_ids` if not given. A prefix of meta tokens is part of the documents that
        `segment_ids` lay out: tokens at the first positions of each are replaced by it. Rows without `segment_ids`
        get theirs here, and only the tokens' own outputs are returned.

        `noise` is the key of a training step's random numbers, for mixers that draw some; `progress` is the share of
        the steps that lie behind it.
        """
        prefix = 0 if segment_ids is not None or positions is not None else self.cfg.prefix.meta_tokens
        if prefix:
            tokens = jnp.pad(tokens, ((0, 0), (prefix, 0)))
            modes = None if modes is None else jnp.pad(modes, ((0, 0), (prefix, 0)))
        shards = Shards.of(tokens.shape, segment_ids, self.strategies, self.layout)
        drawn = {"noise": noise, "progress": progress}
        facts = {"modes": modes, "taps": taps or {}, "shards": shards, "impl": impl or self.cfg.impl, **drawn}
        ctx = mixers.Context.of(tokens, segment_ids, **facts)
        if positions is not None:
            ctx = dataclasses.replace(ctx, positions=positions)
        along = {"positions": ctx.positions, "segment_ids": segment_ids, "modes": modes}
        tokens, along = jax.tree.map(self.place, (tokens, along))
        x, _, losses = self._run(tokens, dataclasses.replace(ctx, **along), None)
        return (x if placed else restore(x, self.layout))[:, prefix:], losses

    def place(self, x: Array) -> Array:
        """x [B,T,...] in the order in which the devices hold rows, see `parallel.layout`."""
        return place(x, self.layout)

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... rows"]:
        """fp32 logits of hidden states, over the rounded-up vocabulary (rows beyond it are masked)."""
        return (self.head or self.embed).logits(x, self.cfg.logit_softcap)

    def init_cache(self, batch: int, max_len: int, dtype: Any = jnp.float32) -> Cache:
        """The state before the first token, for documents of up to `max_len` tokens: that after the prefix, if any."""
        prefix = self.cfg.prefix.meta_tokens

        def stacked(blocks: tuple, spec: LayerSpec, repeats: int, loops: int) -> PyTree:
            """Zeros for every pass and repeat, of the size that the pass with the widest window needs."""
            wholes: Any = [self.shared[spec.block]] if spec.shared else blocks
            states = [block.init_state(batch, prefix + max_len, jnp.dtype(dtype), self.shared) for block in wholes]
            shape = lambda xs: np.max([x.shape for x in xs], axis=0).astype(int)  # noqa: E731
            return jax.tree.map(lambda *xs: jnp.zeros((loops, repeats, *shape(xs)), xs[0].dtype), *states)

        layers: list[list[PyTree]] = []
        for section, own in self._by_section():
            for g, period in own:
                passes = [variant(g, i, period, self.cfg, self.shared, self.depth) for i in range(len(g.variants))]
                blocks = zip(*(p.blocks for p in passes), strict=True)
                layers.append(
                    [stacked(b, spec, g.repeats, section.loops) for b, spec in zip(blocks, g.period, strict=True)]
                )
        zeros = jnp.zeros((batch,), jnp.int32)
        final = self.norm.init_state(batch, jnp.dtype(dtype)) if isinstance(self.norm, TimestepNorm) else None
        cache = Cache(position=zeros, segment=zeros, layers=layers, final=final)
        if not prefix:
            return cache
        tokens = jnp.zeros((batch, prefix), jnp.int32)
        ctx = context(cache, tokens, None)
        return advance(cache, ctx, *self._run(tokens, ctx, layers, final)[1])

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        segment_ids: Array | None = None,
        *,
        modes: Array | None = None,
        impl: str | None = None,
    ) -> tuple[Float[Array, "B T vocab"], Cache]:
        """Logits of tokens that follow the cache, and the cache after them.

        Without `segment_ids` the tokens continue the document in progress. Rows of different length are padded on
        the right with id 0; what comes next then follows the last real token.
        """
        ctx = dataclasses.replace(context(cache, tokens, segment_ids), modes=modes, impl=impl or self.cfg.impl)
        x, states, _ = self._run(tokens, ctx, cache.layers, cache.final)
        return self.logits(x)[..., : self.vocabulary], advance(cache, ctx, *states)

    def step(
        self, token: Int[Array, "B"], cache: Cache, segment: Array | None = None, *, modes: Array | None = None
    ) -> tuple[Array, Cache]:
        """Logits [B,vocab] after one more token, and the cache: `prefill` with T = 1."""
        segment, modes = (None if x is None else x[:, None] for x in (segment, modes))
        logits, cache = self.prefill(token[:, None], cache, segment, modes=modes)
        return logits[:, 0], cache

    def enter(self, tokens: Int[Array, "B T"], ctx: mixers.Context) -> tuple[Float[Array, "B T D"], mixers.Context]:
        """What the first layer reads, and the context with all that the model tells its layers."""
        x = self.embed(tokens) * self.cfg.embed_scale
        if self.meta is not None:
            inside = ctx.positions < len(self.meta)
            x = jnp.where(inside[..., None], self.meta[...][jnp.minimum(ctx.positions, len(self.meta) - 1)], x)
            if ctx.modes is not None:  # the cache holds the prefix before anyone chooses a mode for it
                ctx = dataclasses.replace(ctx, modes=jnp.where(inside, -1, ctx.modes))
        x = constrain(x, ("batch", "seq", "act_embed"))
        bounds = {b.width: b() for b in self.bounds}
        return x, dataclasses.replace(ctx, depth=self.depth, lower_bounds=bounds, embeddings=x)

    def finish(self, x: Float[Array, "B T D"], ctx: mixers.Context, state: PyTree = None) -> tuple[Array, PyTree]:
        """What the last norm makes of the stream, and its state, if it has one."""
        return self.norm(x, ctx, state) if isinstance(self.norm, TimestepNorm) else (self.norm(x), None)

    def _run(
        self, tokens: Array, ctx: mixers.Context, layers: list | None, last: PyTree = None
    ) -> tuple[Array, tuple[list, PyTree], Losses]:
        """The normed stream, the states of the layers and of the last norm, and the losses."""
        x, ctx = self.enter(tokens, ctx)
        new: list[PyTree] = []
        losses: Losses = {}
        for i, (section, own) in enumerate(self._by_section()):
            given = None if layers is None else layers[len(new) : len(new) + len(own)]
            x, states, lost = self._run_section(section, own, self.passes[i].gates, x, ctx, given)
            new += states
            losses = added(losses, lost)
        if self.cfg.loop.norm == "final" and self.sections[-1].loops > 1:
            return x, (new, None), losses
        x, last = self.finish(x, ctx, last)
        return x, (new, last if layers is not None else None), losses

    def _by_section(self) -> list[tuple[Section, list[tuple[Group, Period]]]]:
        pairs = list(zip(self.groups, self.periods, strict=True))
        ends = [section.start + len(section.layers) for section in self.sections]
        return [
            (section, [(g, p) for g, p in pairs if section.start <= g.start < end])
            for section, end in zip(self.sections, ends, strict=True)
        ]

    def _run_section(
        self,
        section: Section,
        own: list[tuple[Group, Period]],
        gates: nnx.Param | None,
        x: Array,
        ctx: mixers.Context,
        states: list | None,
    ) -> tuple[Array, list, Losses]:
        """All passes over the layers of a section: equal passes in a row are one scan, over their gates and states."""
        made, lost, start = [], [], 0
        for index, (n, _) in enumerate(section.passes):
            periods = [(g, variant(g, index, p, self.cfg, self.shared, self.depth)) for g, p in own]

            def once(x: Array, xs: tuple, periods: list = periods) -> tuple[Array, tuple]:
                gate, given = xs
                return self._pass(section, periods, gate, x, ctx, given)

            take = lambda tree, a=start, b=start + n: jax.tree.map(lambda leaf: leaf[a:b], tree)  # noqa: E731
            xs = (None if gates is None else take(gates[...]), take(states))
            if n == 1:  # no loop at all, and nothing for XLA to carry around one
                x, ys = once(x, jax.tree.map(lambda leaf: leaf[0], xs))
                ys = jax.tree.map(lambda leaf: leaf[None], ys)
            else:
                x, ys = jax.lax.scan(once, x, xs, length=n)
            made.append(ys[0])
            lost.append(jax.tree.map(jnp.sum, ys[1]))
            start += n
        states = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *made) if len(made) > 1 else made[0]
        return x, states, jax.tree.map(lambda *values: sum(values), *lost)

    def _pass(
        self,
        section: Section,
        periods: list[tuple[Group, Period]],
        gate: Array | None,
        x: Array,
        ctx: mixers.Context,
        states: list | None,
    ) -> tuple[Array, tuple[list, Losses]]:
        entry, new = x, []
        losses: Losses = {}
        made: Made = {}
        for i, (g, period) in enumerate(periods):
            given = None if states is None else states[i]
            run = run_group(
                g, period, x, ctx, given, shared=self.shared, made=made, remat=self.remat, unroll=self.unroll
            )
            x, made = run.x, run.made
            new.append(run.states)
            losses = added(losses, run.losses)
        if self.cfg.loop.norm == "final" and section.loops > 1:
            x, _ = self.finish(x, ctx)
        if gate is not None:
            x = x + (fp32(gate) * fp32(entry)).astype(x.dtype)
        return x, (new, losses)


def _final_norm(cfg: ModelConfig, rngs: nnx.Rngs) -> Norm | TimestepNorm:
    if cfg.final_norm is None:
        return NORMS[cfg.norm](cfg.d_model, axes=("norm",), eps=cfg.norm_eps, rngs=rngs)
    return TimestepNorm(cfg.d_model, cfg.final_groups, cfg.final_norm, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class ParamMeta:
    """How a parameter is sharded and optimised; see `nn.param`."""

    axes: tuple[str, ...]
    decay: bool
    matrix: tuple[tuple[int, ...], tuple[int, ...]] | None
    cast: bool
    rule: str = "gradient"


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model without its arrays. Parameters are a flat dict: `periods/0/blocks/1/mixer/q/kernel` -> array."""

    cfg: ModelConfig
    graph: nnx.GraphDef
    abstract: dict[str, nnx.Param]
    make: Callable[[Array], LM]

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter."""
        return {path: jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in self.abstract.items()}

    @property
    def meta(self) -> dict[str, ParamMeta]:
        """Metadata of every parameter."""
        names = [field.name for field in dataclasses.fields(ParamMeta)]
        return {path: ParamMeta(**{n: p.get_metadata(n) for n in names}) for path, p in self.abstract.items()}

    def init(self, key: Array) -> dict[str, Array]:
        """fp32 parameters; a pure function of the key, to be jitted with output shardings where they are needed."""
        return {_path(p): v[...] for p, v in nnx.to_flat_state(nnx.split(self.make(key))[1])}

    def cast(self, params: dict[str, Array], dtype: Any) -> dict[str, Array]:
        """Parameters used in matrix products in the compute dtype; gates, norms and the like stay fp32."""
        return {k: v.astype(dtype) if self.abstract[k].get_metadata("cast") else v for k, v in params.items()}

    def merge(self, params: dict[str, Array]) -> LM:
        """The model with these parameters."""
        flat = [(_keys(path), variable.replace(params[path])) for path, variable in self.abstract.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))


def blueprint(
    cfg: ModelConfig,
    *,
    remat: str = "none",
    unroll: int = 1,
    scan: bool = True,
    strategy: str | None = None,
    layout: str = "contiguous",
) -> Blueprint:
    """The blueprint of a model.

    Args:
      remat: what the backward pass recomputes, a key of `stack.REMAT`.
      unroll: repeated periods per iteration of the layer scan; more compile time, fewer copies.
      scan: False gives every layer parameters of its own, for inspection.
      strategy, layout: those of `MeshConfig`, for rows whose tokens are divided.
    """
    if remat not in REMAT:
        raise ConfigError("train.remat", remat, f"expected one of {', '.join(REMAT)}")

    def make(key: Array) -> LM:
        return LM(cfg, remat=remat, unroll=unroll, scan=scan, strategy=strategy, layout=layout, key=key)

    graph, state = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))
    return Blueprint(cfg, graph, {_path(p): v for p, v in nnx.to_flat_state(state)}, make)


def build(cfg: ModelConfig | Mapping[str, Any], seed: int = 0) -> LM:
    """A model with fresh fp32 parameters, from a config, a ConfigDict or a dict of `ModelConfig` fields.

    Raises:
      ConfigError: anything wrong in the config.
    """
    plan = blueprint(model_config(cfg))
    return plan.merge(jax.jit(plan.init)(jax.random.key(seed)))


def _path(keys: tuple) -> str:
    return "/".join(map(str, keys))


def _keys(path: str) -> tuple[str | int, ...]:
    return tuple(int(k) if k.isdigit() else k for k in path.split("/"))
