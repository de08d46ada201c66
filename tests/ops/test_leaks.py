"""What one document's gates do to the next: nothing, not even to the last bit."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.typing import Array
from hydrax.ops.delta import delta_rule
from hydrax.ops.linear import linear_attention
from hydrax.ops.linear.cases import Case
from hydrax.ops.slots import slot_attention
from tests.ops import matrix_state as ms
from tests.tolerances import assert_equal

OPS: dict[str, tuple[Callable[..., tuple], tuple[str, ...]]] = {
    "linear": (linear_attention, ("scalar", "vector")),
    "delta": (delta_rule, ("scalar", "vector")),
    "slots": (lambda **x: slot_attention(**x, write=-jnp.expm1(x["log_decay"])), ("vector",)),
}


@pytest.mark.parametrize(("op", "decay"), [(op, decay) for op, (_, decays) in OPS.items() for decay in decays])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3])
def test_sums_of_decays_start_again_with_a_document(op: str, decay: str, size: float) -> None:
    """Small decays are where the rounding of a running sum would show what came before it."""
    x = ms.in_jax(ms.inputs(Case(1, 40, 2, 2, 8, 8, decay), beta=op == "delta"))
    del x["initial_state"]
    x["log_decay"] *= size
    ids = jnp.asarray([[1] * 5 + [2] * 8 + [3] * 27])

    @jax.jit
    def run(g: Array) -> Array:
        return OPS[op][0](**x | {"log_decay": g}, segment_ids=ids, impl="chunked", chunk_size=16)[0]

    other = x["log_decay"].at[:, :5].multiply(3.7)
    before, after = run(x["log_decay"]), run(other)
    assert_equal("later documents", after[:, 5:], before[:, 5:])
    assert np.any(np.asarray(after[:, :5] != before[:, :5]))
