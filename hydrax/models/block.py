"""One layer: a mixer and an FFN, each reading a norm of the residual stream and adding to it."""

import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hydrax import mixers
from hydrax.core.typing import Array, Float, PyTree
from hydrax.models.spec import LayerSpec, ModelConfig
from hydrax.nn.ffn import FFN
from hydrax.nn.norm import NORMS


class Block(nnx.Module):
    """x ← x + mixer(norm x);  x ← x + ffn(norm x)."""

    def __init__(self, cfg: ModelConfig, spec: LayerSpec, *, depth: int, rngs: nnx.Rngs):
        norm = functools.partial(NORMS[cfg.norm], cfg.d_model, axes=("norm",), eps=cfg.norm_eps, rngs=rngs)
        self.name = f"{spec.block}"
        self.mixer_norm = norm()
        self.mixer = mixers.get(spec.mixer)(cfg.d_model, spec.options, rngs=rngs)
        self.ffn_norm = None if spec.ffn_dim is None else norm()
        self.ffn = None if spec.ffn_dim is None else FFN(cfg.d_model, spec.ffn_dim, spec.ffn, rngs=rngs)
        # 2·depth terms are added to the stream: their sum keeps the scale of one
        for _, parameter in nnx.to_flat_state(nnx.state(self, nnx.Param)):
            if parameter.get_metadata("residual"):
                parameter[...] = parameter[...] * (2 * depth) ** -0.5

    def __call__(
        self, x: Float[Array, "B T D"], ctx: mixers.Context, state: PyTree | None = None
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        with jax.named_scope(self.name):
            y, state = self.mixer(self.mixer_norm(x), ctx, state)
            x = x + checkpoint_name(y, "mixer_out")
            if self.ffn is not None and self.ffn_norm is not None:
                x = x + checkpoint_name(self.ffn(self.ffn_norm(x)), "ffn_out")
            return x, state
