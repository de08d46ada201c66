"""The language model: embedding, layers, final norm, logits; and its blueprint, which holds no arrays."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax import mixers
from hydrax.core.build import ConfigError
from hydrax.core.typing import Array, Float, Int, PyTree
from hydrax.models.cache import Cache, advance, context
from hydrax.models.spec import BYTE_VOCABULARY, Group, ModelConfig, group, model_config, resolve
from hydrax.models.stack import REMAT, init_group, run_group
from hydrax.nn.bounds import LowerBounds
from hydrax.nn.embed import Embedding
from hydrax.nn.norm import NORMS
from hydrax.parallel.rules import constrain


class LM(nnx.Module):
    """A causal language model over any pattern of mixers.

    Computation runs in the dtype of the embedding table (see `Blueprint.cast`); logits are fp32.
    """

    def __init__(self, cfg: ModelConfig, *, remat: str = "none", unroll: int = 1, scan: bool = True, key: Array):
        layers = resolve(cfg)
        self.cfg, self.remat, self.unroll, self.depth = cfg, remat, unroll, len(layers)
        self.groups = group(layers) if scan else [Group(i, (layer,), 1) for i, layer in enumerate(layers)]
        self.vocabulary = cfg.vocab_size or BYTE_VOCABULARY
        rngs = nnx.Rngs(params=jax.random.fold_in(key, self.depth))
        self.embed = Embedding(self.vocabulary, cfg.d_model, rngs=rngs)
        self.head = None if cfg.tie else Embedding(self.vocabulary, cfg.d_model, rngs=rngs)
        self.norm = NORMS[cfg.norm](cfg.d_model, axes=("norm",), eps=cfg.norm_eps, rngs=rngs)
        widths = dict.fromkeys(w(s.options) for s in layers if (w := mixers.row(s.mixer).lower_bound) is not None)
        self.bounds = nnx.List([LowerBounds(self.depth, width, rngs=rngs) for width in widths])
        self.periods = nnx.List([init_group(g, cfg, depth=self.depth, key=key) for g in self.groups])

    def __call__(
        self, tokens: Int[Array, "B T"], segment_ids: Array | None = None, positions: Array | None = None
    ) -> Float[Array, "B T vocab"]:
        """Logits of the next token after each token. `segment_ids` keep packed documents apart (0 = padding)."""
        return self.logits(self.hidden(tokens, segment_ids, positions))[..., : self.vocabulary]

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Array | None = None,
        positions: Array | None = None,
        *,
        impl: str | None = None,
        taps: Mapping[str, Callable[[Array], Array]] | None = None,
    ) -> Float[Array, "B T D"]:
        """The normed residual stream after the last layer. `positions` follow from `segment_ids` if not given."""
        ctx = mixers.Context.of(tokens, segment_ids, impl=impl, taps=taps or {})
        if positions is not None:
            ctx = dataclasses.replace(ctx, positions=positions)
        return self._run(tokens, ctx, None)[0]

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... rows"]:
        """fp32 logits of hidden states, over the rounded-up vocabulary (rows beyond it are masked)."""
        return (self.head or self.embed).logits(x, self.cfg.logit_softcap)

    def init_cache(self, batch: int, max_len: int, dtype: Any = jnp.float32) -> Cache:
        """The state before the first token, for documents of up to `max_len` tokens."""

        def stacked(block: Any, repeats: int) -> PyTree:
            state = block.mixer.init_state(batch, max_len, jnp.dtype(dtype))
            return jax.tree.map(lambda x: jnp.zeros((repeats, *x.shape), x.dtype), state)

        layers = [
            [stacked(block, g.repeats) for block in period.blocks]
            for g, period in zip(self.groups, self.periods, strict=True)
        ]
        zeros = jnp.zeros((batch,), jnp.int32)
        return Cache(position=zeros, segment=zeros, layers=layers)

    def prefill(
        self, tokens: Int[Array, "B T"], cache: Cache, segment_ids: Array | None = None, *, impl: str | None = None
    ) -> tuple[Float[Array, "B T vocab"], Cache]:
        """Logits of tokens that follow the cache, and the cache after them.

        Without `segment_ids` the tokens continue the document in progress. Rows of different length are padded on
        the right with id 0; what comes next then follows the last real token.
        """
        ctx = dataclasses.replace(context(cache, tokens, segment_ids), impl=impl)
        x, layers = self._run(tokens, ctx, cache.layers)
        return self.logits(x)[..., : self.vocabulary], advance(cache, ctx, layers)

    def step(self, token: Int[Array, "B"], cache: Cache, segment: Array | None = None) -> tuple[Array, Cache]:
        """Logits [B,vocab] after one more token, and the cache: `prefill` with T = 1."""
        logits, cache = self.prefill(token[:, None], cache, None if segment is None else segment[:, None])
        return logits[:, 0], cache

    def _run(self, tokens: Array, ctx: mixers.Context, layers: list | None) -> tuple[Array, list]:
        ctx = dataclasses.replace(ctx, depth=self.depth, lower_bounds={b.width: b() for b in self.bounds})
        x = constrain(self.embed(tokens) * self.cfg.embed_scale, ("batch", "seq", "act_embed"))
        new = []
        for i, (g, period) in enumerate(zip(self.groups, self.periods, strict=True)):
            given = None if layers is None else layers[i]
            x, states = run_group(g, period, x, ctx, given, remat=self.remat, unroll=self.unroll)
            new.append(states)
        return self.norm(x), new


@dataclasses.dataclass(frozen=True)
class ParamMeta:
    """How a parameter is sharded and optimised; see `nn.param`."""

    axes: tuple[str, ...]
    decay: bool
    matrix: tuple[tuple[int, ...], tuple[int, ...]] | None
    cast: bool


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


def blueprint(cfg: ModelConfig, *, remat: str = "none", unroll: int = 1, scan: bool = True) -> Blueprint:
    """The blueprint of a model.

    Args:
      remat: what the backward pass recomputes, a key of `stack.REMAT`.
      unroll: repeated periods per iteration of the layer scan; more compile time, fewer copies.
      scan: False gives every layer parameters of its own, for inspection.
    """
    if remat not in REMAT:
        raise ConfigError("train.remat", remat, f"expected one of {', '.join(REMAT)}")

    def make(key: Array) -> LM:
        return LM(cfg, remat=remat, unroll=unroll, scan=scan, key=key)

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
