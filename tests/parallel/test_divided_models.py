"""Whole models on divided rows: losses and gradients are those of one device, whatever the grammar makes of mixers."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.core.typing import Array
from hydrax.models import lm
from hydrax.models.divided import check_divided
from hydrax.models.spec import ModelConfig
from hydrax.parallel import rules
from hydrax.parallel.mesh import AXES, MeshConfig
from hydrax.train.optim import OptimConfig, make_optimizer, make_schedule
from hydrax.train.state import abstract_state, shardings
from hydrax.train.step import make_train_step
from tests.contract.cases import D
from tests.contract.specs import VOCABULARY, features, random_spec
from tests.tolerances import TOLERANCE, assert_close, assert_trees_close
from tests.train import tiny

pytestmark = pytest.mark.thorough

ROWS, TOKENS = 4, 48
MODELS = {
    "heads": {"pattern": "heads(2*attn,2*kda)"},
    "parallel": {"pattern": "2*parallel(swa,mamba2)"},
    "modes": {"pattern": "modes(gla),modes(gdn)"},
    "loops": {"pattern": "loop(2,kda,attn)", "loop": {"gate": "channel"}},
    "route": {"pattern": "route(attn,swa)"},
    "experts": {"pattern": "gdn,attn", "ffn": "moe", "moe": {"experts": 4, "top_k": 2, "width": 16, "balance": 0.1}},
    "kv": {"pattern": "2*swa,hgrn2", "share": {"kv": ((0, 1),)}},
}
"""By what is in them that is neither one mixer nor a stack of them."""


def model(**options: object) -> ModelConfig:
    names = {name: dict(mixers.row(name).tiny) for name in mixers.names()}
    names["attn"]["value_dim"] = names["swa"]["value_dim"] = 16
    blocks = {"ffn_dim": 32, "vocab_size": VOCABULARY}
    return build(ModelConfig, {"d_model": D, "mixers": names, **blocks, **options})


def batch(with_modes: bool) -> dict[str, np.ndarray]:
    made = tiny.batch(ROWS, TOKENS, seed=3)
    modes = np.random.default_rng(5).integers(-1, 2, (ROWS, TOKENS)).astype(np.int32)
    return made | ({"modes": modes} if with_modes else {})


def devices(mesh: MeshConfig) -> Mesh:
    """As many of the 8 as it takes."""
    sizes = [getattr(mesh, axis) for axis in AXES]
    return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * len(AXES), devices=jax.devices()[: math.prod(sizes)])


def evaluate(cfg: ModelConfig, mesh: MeshConfig, with_modes: bool) -> tuple[dict[str, Array], Array, dict[str, Array]]:
    """Gradients, losses of all tokens together and the layers' own, in fp64, on the devices of that mesh."""
    plan = lm.blueprint(cfg, strategy=mesh.strategy, layout=mesh.layout)
    rng = np.random.default_rng(0)
    params = {name: (len(x.shape) < 2) + 0.2 * rng.standard_normal(x.shape) for name, x in plan.shapes.items()}

    def loss(params: dict[str, Array], given: dict[str, Array]) -> tuple[Array, tuple]:
        lm_ = plan.merge(params)
        rows = (given["tokens"], given["segment_ids"], given["positions"])
        x, losses = lm_.forward(*rows, modes=given.get("modes"), placed=True)
        log_p, targets = jax.nn.log_softmax(lm_.logits(x)), lm_.place(given["targets"])
        nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        total = jnp.sum(nll * lm_.place(given["weights"]))
        return total + 10 * sum(losses.values()), (total, losses)

    on = devices(mesh)
    with jax.enable_x64(True), jax.set_mesh(on):
        given = {name: jax.device_put(x, rules.batch_sharding(on)) for name, x in batch(with_modes).items()}
        grads, (total, losses) = jax.jit(jax.grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, params), given)
        return jax.device_get((grads, total, losses))


def config(which: str | int) -> ModelConfig:
    """One of `MODELS`, or the random model of that number."""
    return model(**MODELS[which]) if isinstance(which, str) else random_spec(which)


@functools.cache
def whole(which: str | int, with_modes: bool) -> tuple:
    return evaluate(config(which), MeshConfig(fsdp=1), with_modes)


def compare(which: str | int, mesh: MeshConfig, *, with_modes: bool = False) -> None:
    cfg = config(which)
    check_divided(cfg, mesh, {axis: getattr(mesh, axis) for axis in AXES}, TOKENS)
    got, want = evaluate(cfg, mesh, with_modes), whole(which, with_modes)
    assert_trees_close("gradients, losses", got, want, TOLERANCE["fp64"])


@pytest.mark.parametrize(
    ("name", "layout", "context"),
    [
        pytest.param(name, layout, context, marks=[] if (name, layout) == ("heads", "zigzag") else [pytest.mark.slow])
        for name in MODELS
        for layout, context in (("contiguous", 4), ("zigzag", 2))
    ],
)
def test_a_hybrid_is_that_of_one_device(name: str, layout: str, context: int):
    mesh = MeshConfig(fsdp=4 // context, context=context, layout=layout)
    compare(name, mesh, with_modes=name == "modes")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("seed", range(20))
def test_a_random_hybrid_is_that_of_one_device(seed: int, layout: str):
    mesh = MeshConfig(fsdp=2, context=2, layout=layout)
    why = [reason for feature, reason in IN_ORDER.items() if layout == "zigzag" and feature in features(config(seed))]
    if not why:
        compare(seed, mesh, with_modes=seed % 2 == 1)
        return
    with pytest.raises(ConfigError, match="|".join(why)):
        compare(seed, mesh)


IN_ORDER = {
    "aaren": "aaren is served by ulysses",
    "agent": "agent is served by ulysses",
    "efficient": "efficient is served by ulysses",
    "lstm": "lstm is served by ulysses",
    "nonapprox": "nonapprox is served by ulysses",
    "sha_rnn": "sha_rnn is served by ulysses",
    "workspace": "memory.workspace reads rows in their order",
    "granularity chunk": "granularity = 'chunk' reads rows in their order",
}
"""What of a random hybrid has no zigzag form, and what is said of it."""


def test_hidden_states_come_back_in_the_order_of_the_row():
    plan = lm.blueprint(model(pattern="attn,gla"), layout="zigzag")
    params, given = jax.jit(plan.init)(jax.random.key(0)), jax.tree.map(jnp.asarray, batch(False))
    rows = given["tokens"], given["segment_ids"], given["positions"]
    want = jax.jit(lambda params: plan.merge(params).hidden(*rows))(params)
    with jax.set_mesh(devices(MeshConfig(fsdp=1, context=4))):
        got = jax.jit(lambda params: plan.merge(params).hidden(*rows))(params)
    assert_close("hidden", jax.device_get(got), want, TOLERANCE["fp32_op"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("pattern", "keys"), [("gdn", set()), ("attn", {(2, 8), (2, 16), ()})])
def test_a_training_step_gathers_no_tokens(pattern: str, keys: set, layout: str):
    """But for keys, values and ids of softmax layers."""
    tokens, on, cfg = 1024, devices(MeshConfig(fsdp=1, context=4)), build(OptimConfig, {})
    plan = lm.blueprint(model(pattern=pattern), layout=layout)
    tx = make_optimizer(cfg, 10, plan.meta)
    train, state = make_train_step(plan, tx, make_schedule(cfg, 10)), abstract_state(plan, tx, on)
    with jax.set_mesh(on):
        given = jax.jit(train, in_shardings=(shardings(state), rules.batch_sharding(on)))
        program = given.lower(state, tiny.batch(ROWS, tokens, seed=0)).compile().as_text()
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\][^=\n]* all-gather(?:-start)?\(", program)
    found = [tuple(int(n) for n in shape.split(",") if n) for shape in gathered]
    assert found
    assert {shape[2:] for shape in found if tokens in shape} == keys
