"""The first two steps of a small hybrid, as numbers: any change of initialisation, model, loss or optimiser shows."""

import jax
import pytest

from hydrax import mixers
from hydrax.core.build import build
from hydrax.models import lm
from hydrax.models.spec import ModelConfig
from hydrax.train.optim import OptimConfig, make_optimizer, make_schedule
from hydrax.train.state import init_state
from hydrax.train.step import make_train_step
from tests.train import tiny

pytestmark = pytest.mark.thorough

GOLDEN = {
    "adamw": [
        {"loss": 3.88567, "bits_per_byte": 2.80292, "grad_norm": 10.6458, "lr": 0.0005},
        {"loss": 3.93393, "bits_per_byte": 2.83773, "grad_norm": 10.4563, "lr": 0.001},
    ],
    "muon": [
        {"loss": 3.94169, "bits_per_byte": 2.84333, "grad_norm": 6.13203, "lr": 0.0005},
        {"loss": 3.91536, "bits_per_byte": 2.82433, "grad_norm": 7.92649, "lr": 0.001},
    ],
}

ADVICE = """the metrics of the first steps have changed.
If you did not mean to change initialisation, model, loss or optimiser, something did it for you: find out what.
If you did, say so in CHANGELOG.md (runs will not be comparable) and replace the entry of GOLDEN by
    {name!r}: {metrics},"""


@pytest.mark.parametrize(
    ("optimizer", "pattern"), [("adamw", "gdn,attn,mamba2,gla,lightning,swa"), ("muon", "2*(gla,attn)")]
)
def test_first_steps(optimizer: str, pattern: str):
    cfg = {
        "d_model": 32,
        "pattern": pattern,
        "vocab_size": tiny.VOCABULARY,
        "ffn_dim": 32,
        "mixers": {name: mixers.row(name).tiny for name in mixers.names()},
    }
    plan = lm.blueprint(build(ModelConfig, cfg))
    optim = build(OptimConfig, {"name": optimizer, "lr": 1e-3, "warmup": 2})
    tx = make_optimizer(optim, 10, plan.meta)
    state = jax.jit(lambda key: init_state(plan, tx, key))(jax.random.key(0))
    step = jax.jit(make_train_step(plan, tx, make_schedule(optim, 10), accumulate=2, z_loss=optim.z_loss))
    metrics = []
    for i in range(2):
        state, values = step(state, tiny.batch(4, 24, seed=i))
        metrics.append({name: float(f"{values[name]:.6g}") for name in ("loss", "bits_per_byte", "grad_norm", "lr")})
    same = metrics == [pytest.approx(want, rel=1e-4) for want in GOLDEN[optimizer]]
    assert same, ADVICE.format(name=optimizer, metrics=metrics)
