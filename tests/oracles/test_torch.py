"""Ops against PyTorch's own: `make oracles`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.nn.norm import rms_norm
from hydrax.ops.conv import short_conv
from hydrax.ops.softmax import attention
from hydrax.train.loss import chunked_cross_entropy
from tests.tolerances import TOLERANCE, assert_close

torch: Any = pytest.importorskip("torch")

pytestmark = pytest.mark.oracle


def arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def compare(ours: Any, theirs: Any, *inputs: np.ndarray) -> None:
    """Outputs, and the gradients of every input under one random cotangent."""
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    expected = theirs(*tensors)
    actual, pull = jax.vjp(jax.jit(ours), *map(jnp.asarray, inputs))
    assert_close("output", actual, expected.detach().numpy(), TOLERANCE["fp32_op"])
    cotangent = np.random.default_rng(1).normal(size=actual.shape).astype(np.float32)
    expected.backward(torch.tensor(cotangent))
    for i, (mine, tensor) in enumerate(zip(pull(jnp.asarray(cotangent)), tensors, strict=True)):
        assert_close(f"gradient {i}", mine, tensor.grad.numpy(), TOLERANCE["fp32_op"])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_attention(kv_heads: int) -> None:
    def theirs(q: Any, k: Any, v: Any) -> Any:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        o = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return o.transpose(1, 2)

    compare(attention, theirs, *arrays((2, 37, 4, 8), (2, 37, kv_heads, 8), (2, 37, kv_heads, 8)))


def test_short_convolution() -> None:
    def theirs(x: Any, w: Any, b: Any) -> Any:
        y = torch.nn.functional.conv1d(x.transpose(1, 2), w.T[:, None], b, padding=3, groups=6)
        return torch.nn.functional.silu(y[..., : x.shape[1]].transpose(1, 2))

    def ours(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        return short_conv(x, w, b, activation="silu")[0]

    compare(ours, theirs, *arrays((2, 19, 6), (4, 6), (6,)))


def test_rms_norm() -> None:
    def theirs(x: Any, w: Any) -> Any:
        return torch.nn.functional.rms_norm(x, (16,), w, eps=1e-6)

    compare(rms_norm, theirs, *arrays((3, 5, 16), (16,)))


def test_cross_entropy() -> None:
    targets = np.random.default_rng(2).integers(0, 11, (2, 13))

    def theirs(x: Any, w: Any) -> Any:
        return torch.nn.functional.cross_entropy(
            (x @ w).reshape(-1, 11), torch.tensor(targets).reshape(-1), reduction="sum"
        )

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        ones = jnp.ones(targets.shape)
        logits = lambda h: jnp.matmul(h, w, precision="highest")  # noqa: E731
        return chunked_cross_entropy(x, logits, jnp.asarray(targets), ones, chunk=4).nll

    compare(ours, theirs, *arrays((2, 13, 8), (8, 11)))
