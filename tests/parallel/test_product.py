"""Every mixer, strategy and layout on 2, 4 and 8 devices: what a whole row gives, or the one line that refuses it.

`make test` runs a few of them, `make test-all` the product. The reference is the recurrent form on one device.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.core.typing import Array, PyTree
from hydrax.models.divided import check_divided
from hydrax.models.spec import ModelConfig
from hydrax.ops.documents import document_positions
from hydrax.parallel import layout as layouts, shards
from hydrax.parallel.mesh import MeshConfig
from hydrax.parallel.shards import NEEDS, STRATEGIES, Shards
from tests.contract.cases import VARIANTS, Case, D, case, normal, segments
from tests.parallel.devices import mesh_of
from tests.tolerances import TOLERANCE, assert_trees_close

T = 48
DOCUMENTS = np.stack([segments([6, 19, 1, 2, 13, 7], T), segments([5, 30], T)])
"""On 8 devices of 6 tokens: an edge on that of a shard, documents over three and more shards, two edges within one, one
token alone; and padding that fills the last two shards. On 16 slots of 3 tokens the same."""

NAMES = [name for name in NEEDS if name != "halo"]  # which is no choice
PRODUCT = [
    (name, strategy, layout, P)
    for name in mixers.names()
    for strategy in NAMES
    for layout in layouts.LAYOUTS
    for P in (2, 4, 8)
]
COVERING = [
    ("gdn", "allgather_state", "zigzag", 4),
    ("hgrn", "ring_state", "contiguous", 8),
    ("mamba2", "ring_state", "zigzag", 2),
    ("attn", "ring", "zigzag", 4),
    ("swa", "ulysses", "contiguous", 2),
    ("dma", "allgather_kv", "zigzag", 4),
    ("nats", "ring", "zigzag", 4),
    ("dsa", "allgather_kv", "zigzag", 4),
    ("infllm2", "allgather_kv", "zigzag", 2),
    ("moba", "allgather_kv", "zigzag", 4),
    ("mosa", "allgather_kv", "zigzag", 2),
    ("routing", "allgather_kv", "zigzag", 2),
    ("mega", "allgather_kv", "zigzag", 4),
    ("nsa", "allgather_kv", "zigzag", 2),
    ("gated_conv", "allgather_state", "zigzag", 4),
    ("megalodon", "ring", "zigzag", 4),
    ("gecko", "ulysses", "contiguous", 2),
    ("sha_rnn", "ulysses", "contiguous", 2),
    ("max_pool", "allgather_state", "zigzag", 4),
    ("token_gate", "ring_state", "contiguous", 4),
    # refused: a strategy of other mixers, a layout, heads, taps
    ("gdn", "ring", "contiguous", 4),
    ("attn", "ulysses", "zigzag", 2),
    ("nonapprox", "ulysses", "zigzag", 2),
    ("nonapprox", "ulysses", "contiguous", 8),
    ("gated_conv", "allgather_state", "zigzag", 8),
]
PATTERNS = {options["pattern"]: i for i, options in enumerate(VARIANTS["swa"]) if "pattern" in options}
PATTERNED = [("s2", "ring", "zigzag", 4), ("gna", "ring", "contiguous", 4), ("spans", "ulysses", "contiguous", 2)]
EXACT = [("lightning", "allgather_state", "zigzag"), ("deltanet", "allgather_state", "contiguous")]


def declared(name: str, strategy: str, layout: str, P: int) -> str | None:
    """The line that refuses a combination, by the tables; None where it is valid."""
    able, options = STRATEGIES[mixers.row(name).transition], case(name).cfg
    if strategy not in able:
        return f"mesh.strategy = {strategy!r}: expected what a mixer of the model has ({name}: {' or '.join(able)})"
    slot, taps = T // (P * len(layouts.LAYOUTS[layout])), getattr(options, "conv_width", 1) - 1
    if taps > slot:
        where = "a row" if layout == "contiguous" else "a row in one piece"
        return f"mesh.context = {P}: {name} sees {taps} tokens back, and a device has {slot} of {where}"
    others = [other for other in able if other != "ulysses"]
    if strategy == "ulysses" and layout == "zigzag":
        instead = f", or mesh.strategy {' or '.join(others)}" if others else ""
        return f"mesh.layout = 'zigzag': {name} is served by ulysses: expected contiguous{instead}"
    for heads in ("heads", "value_heads", "kv_heads"):
        n = getattr(options, heads, None)
        if strategy == "ulysses" and n and n % P:
            allowed = f"expected a multiple of context = {P} per tensor shard"
            return f"mesh.strategy = 'ulysses': {name} has {heads} = {n}; {' or '.join([allowed, *others])}"
    return None


def states(c: Case) -> PyTree | None:
    """A state to start from; None where it is a cache, which is not divided."""
    if c.row.transition not in ("none", "scalar", "diag", "full"):
        return None
    return jax.tree.map(lambda x: np.abs(normal(2, *x.shape)), c.init(2, T))


def evaluate(c: Case, wanted: tuple[str, ...], layout: str, impl: str | None, *inputs: PyTree) -> PyTree:
    """Outputs, final state and all gradients of a sum of both; those of tokens in 16 parts, smaller than any shard."""
    seg, dy = jnp.asarray(DOCUMENTS), jnp.asarray(normal(1, 2, T, D))

    def total(params: dict[str, Array], x: Array, state: PyTree | None) -> tuple[Array, PyTree]:
        facts = {"state": state, "shards": Shards.of(x.shape[:2], seg, wanted, layout), "impl": impl}
        facts |= {"noise": jax.random.key(1)}
        x, ids, positions = (shards.place(a, layout) for a in (x, seg, document_positions(seg)))
        y, end = c(params, x, ids, positions=positions, **facts)
        y = shards.restore(y, layout)
        ends = [jnp.sum(jnp.sin(jnp.arange(e.size).reshape(e.shape)) * e) for e in jax.tree.leaves(end)]
        return jnp.sum(dy * y) + (sum(ends) if state is not None else 0), (y, end)

    (dparams, dx, dstate), (y, end) = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*inputs)
    parts = {"y": jnp.split(y, 16, axis=1), "dx": jnp.split(dx, 16, axis=1)}
    return {"state": end, "dparams": dparams, "dstate": dstate, **parts}


def given(c: Case, dtype: Any) -> tuple:
    def cast(a: Any) -> Array:
        return jnp.asarray(np.asarray(a), dtype if np.issubdtype(np.asarray(a).dtype, np.floating) else None)

    return jax.tree.map(cast, (c.params, normal(0, 2, T, D), states(c)))


@functools.cache
def expected(name: str, dtype: Any, variant: int | None = None) -> PyTree:
    c = case(name, variant)
    return jax.device_get(jax.jit(functools.partial(evaluate, c, (), "contiguous", "recurrent"))(*given(c, dtype)))


def compare(
    name: str, strategy: str, layout: str, P: int, *, dtype: Any, tolerance: float, variant: int | None = None
) -> None:
    c, want = case(name, variant), expected(name, dtype, variant)
    with jax.set_mesh(mesh_of(P)):
        got = jax.jit(functools.partial(evaluate, c, (strategy,), layout, None))(*given(c, dtype))
    assert_trees_close(f"{name}, {strategy}, {layout}, {P}", jax.device_get(got), want, tolerance)


def check(name: str, strategy: str, layout: str, P: int) -> None:
    mesh = build(MeshConfig, {"context": P, "strategy": strategy, "layout": layout})
    model = build(ModelConfig, {"d_model": D, "pattern": name, "mixers": {name: dict(mixers.row(name).tiny)}})
    line = declared(name, strategy, layout, P)
    if line is None:
        check_divided(model, mesh, {"context": P, "tensor": 1}, T)
        compare(name, strategy, layout, P, dtype=jnp.float32, tolerance=TOLERANCE["fp32_op"])
        return
    with pytest.raises(ConfigError) as refused:
        check_divided(model, mesh, {"context": P, "tensor": 1}, T)
    assert str(refused.value) == line


@pytest.mark.parametrize(("name", "strategy", "layout", "P"), COVERING)
def test_a_divided_row_gives_what_a_whole_one_gives(name: str, strategy: str, layout: str, P: int):
    """Outputs, final state, and the gradients of parameters, inputs and initial state, on every shard."""
    check(name, strategy, layout, P)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy", "layout", "P"), [c for c in PRODUCT if c not in COVERING])
def test_every_combination_is_right_or_refused(name: str, strategy: str, layout: str, P: int):
    check(name, strategy, layout, P)


@pytest.mark.parametrize(
    ("pattern", "strategy", "layout", "P"),
    [
        pytest.param(*c, marks=[] if c in PATTERNED else [pytest.mark.slow])
        for c in itertools.product(PATTERNS, STRATEGIES["lse"], layouts.LAYOUTS, (2, 4))
        if c[1:3] != ("ulysses", "zigzag") and c[1::2] != ("ulysses", 4)  # refused: layout, heads of keys
    ],
)
def test_lifetimes_of_keys_on_divided_rows(pattern: str, strategy: str, layout: str, P: int) -> None:
    options: dict[str, Any] = {"dtype": jnp.float32, "tolerance": TOLERANCE["fp32_op"], "variant": PATTERNS[pattern]}
    compare("swa", strategy, layout, P, **options)


@pytest.mark.parametrize(
    ("strategy", "layout", "P"),
    [
        pytest.param("ring", "zigzag", 2),
        pytest.param("allgather_kv", "zigzag", 4, marks=pytest.mark.slow),
        pytest.param("ulysses", "contiguous", 2, marks=pytest.mark.slow),
    ],
)
def test_hops_on_divided_rows(strategy: str, layout: str, P: int) -> None:
    options: dict[str, Any] = {"dtype": jnp.float32, "tolerance": TOLERANCE["fp32_op"]}
    compare(
        "attn", strategy, layout, P, **options, variant=next(i for i, v in enumerate(VARIANTS["attn"]) if "hops" in v)
    )


@pytest.mark.parametrize(
    ("name", "strategy", "layout"),
    [
        pytest.param(name, strategy, layout, marks=[] if (name, strategy, layout) in EXACT else [pytest.mark.slow])
        for name, strategy, layout, P in PRODUCT
        if P == 4 and declared(name, strategy, layout, P) is None
    ],
)
def test_in_fp64_nothing_is_left_but_rounding(name: str, strategy: str, layout: str):
    """What fp32 could hide is no error of 1e-6 in the algebra: in fp64 it would stay."""
    with jax.enable_x64(True):
        compare(name, strategy, layout, 4, dtype=jnp.float64, tolerance=TOLERANCE["fp64"])
