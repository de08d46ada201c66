"""Ops against PyTorch's own: `make oracles`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.conv import short_conv
from hydrax.ops.rowwise import rms_norm
from hydrax.ops.softmax import attention
from hydrax.train.loss import chunked_cross_entropy
from tests.oracles.parity import compare, torch

pytestmark = pytest.mark.oracle

F = torch.nn.functional


def arrays(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_attention(kv_heads: int) -> None:
    def theirs(q: Any, k: Any, v: Any) -> Any:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)

    compare(attention, theirs, arrays(q=(2, 37, 4, 8), k=(2, 37, kv_heads, 8), v=(2, 37, kv_heads, 8)))


def test_short_convolution() -> None:
    def theirs(x: Any, w: Any, b: Any) -> Any:
        y = F.conv1d(x.transpose(1, 2), w.T[:, None], b, padding=3, groups=6)
        return F.silu(y[..., : x.shape[1]].transpose(1, 2))

    def ours(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        return short_conv(x, w, b, activation="silu")[0]

    compare(ours, theirs, arrays(x=(2, 19, 6), w=(4, 6), b=(6,)))


def test_rms_norm() -> None:
    def theirs(x: Any, weight: Any) -> Any:
        return F.rms_norm(x, (16,), weight, eps=1e-6)

    compare(rms_norm, theirs, arrays(x=(3, 5, 16), weight=(16,)))


def test_cross_entropy() -> None:
    targets = np.random.default_rng(2).integers(0, 11, (2, 13))

    def theirs(x: Any, w: Any) -> Any:
        return F.cross_entropy((x @ w).reshape(-1, 11), torch.tensor(targets).reshape(-1), reduction="sum")

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        ones = jnp.ones(targets.shape)
        logits = lambda h: jnp.matmul(h, w, precision="highest")  # noqa: E731
        return chunked_cross_entropy(x, logits, jnp.asarray(targets), ones, chunk=4)[0]

    compare(ours, theirs, arrays(x=(2, 13, 8), w=(8, 11)))
