"""What is particular to max_pool and depthwise_conv: windows within a document, and the gradient of a maximum."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import build
from hydrax.mixers import Context
from hydrax.mixers.average.local import Config, DepthwiseConv, MaxPool
from tests.contract.cases import normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

D, T = 8, 20
SEG = np.stack([segments((1, 2, 9, 6), T), segments((20,), T)])


def make(kind: type, **options: Any) -> Any:
    return kind(D, build(Config, {"heads": 2, **options}).fill(D), rngs=nnx.Rngs(0))


def documents(u: np.ndarray, of) -> np.ndarray:
    """`of` the inputs so far of its document, token by token."""
    z = np.zeros_like(u)
    for b, t in np.argwhere(SEG):
        first = np.flatnonzero(SEG[b] == SEG[b, t])[0]
        z[b, t] = of(u[b, first : t + 1])
    return z


@pytest.mark.parametrize("width", [1, 3, 30])
def test_formulas(width: int):
    x = np.asarray(normal(0, 2, T, D), np.float64)
    with jax.enable_x64(True):
        pool, conv = make(MaxPool, width=width), make(DepthwiseConv, width=width)
        for module, of in (
            (pool, lambda u: u[-width:].max(0)),
            (conv, lambda u: np.einsum("nhv,nhv->hv", np.asarray(conv.conv.weight[...])[-len(u) :], u[-width:])),
        ):
            u = np.einsum("btd,dhv->bthv", x, module.u.kernel[...])
            z, _ = module.mix(jnp.asarray(x), Context.of(x, jnp.asarray(SEG)), None)
            z = np.where(SEG[..., None, None] != 0, z, 0)
            assert_close(type(module).__name__, z, documents(u, of), TOLERANCE["fp64"])


def test_the_gradient_of_a_maximum_goes_to_where_it_is():
    module, x = make(MaxPool, width=3), normal(0, 1, T, D)
    module.u.kernel.set_value(jnp.eye(D).reshape(D, 2, 4))
    gradient = jax.grad(lambda x: module.mix(x, Context.of(x), None)[0].sum())(jnp.asarray(x))
    windows = [np.argmax(x[0, max(0, t - 2) : t + 1], axis=0) + max(0, t - 2) for t in range(T)]
    assert_equal("counts", gradient[0], sum(np.eye(T)[w].T for w in windows))
    same = jax.grad(lambda x: module.mix(x, Context.of(x), None)[0].sum())(jnp.ones((1, 3, D)))
    assert_close("shared evenly", same[0, :, 0], [1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3], TOLERANCE["fp32_op"])


def test_the_recipe_gives_attention_more_heads_with_depth():
    from configs.recipes import inception

    cfg = inception.get_config("tiny")
    found = [inception.layer(i / 11, 24)["mixer"] for i in range(12)]
    assert found[0] == "heads(3*attn, 10*max_pool, 11*depthwise_conv)"
    assert found[-1] == "heads(21*attn, 1*max_pool, 2*depthwise_conv)"
    attention = [int(expression.split("*")[0].split("(")[1]) for expression in found]
    assert attention == sorted(attention)
    assert cfg.model.blocks.layer1.mixer == "heads(8*attn, 4*max_pool, 4*depthwise_conv)"
