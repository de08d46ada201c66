"""`impl` for all ops of a model."""

import jax
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.models import lm
from hydrax.models.spec import ModelConfig
from hydrax.ops import dispatch
from hydrax.ops.table import OPS, complaint
from tests.models.small import config, tokens


def test_pairs_name_the_form_of_some_ops() -> None:
    impl = "delta_rule=chunked, linear_scan = recurrent"
    forms = OPS["linear_scan"]
    assert dispatch.select("linear_scan", impl, forms, "chunked", ()) is forms["recurrent"]
    assert dispatch.select("short_conv", impl, OPS["short_conv"], "chunked", ()) is OPS["short_conv"]["chunked"]
    assert dispatch.select("linear_scan", "recurrent", forms, "chunked", ()) is forms["recurrent"]


@pytest.mark.parametrize(
    ("impl", "allowed"),
    [
        ("cudnn", "expected one of recurrent, chunked, or <op>=<form>"),
        ("delta=chunked", "'delta' is no op; expected .*delta_rule"),
        ("delta_rule=cudnn", "delta_rule has no form 'cudnn'; expected one of recurrent, chunked"),
        ("delta_rule=chunked,", "'' is no op"),
    ],
)
def test_what_no_op_has_is_refused(impl: str, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"impl = '{impl}': {allowed}"):
        build(ModelConfig, {"impl": impl})


@pytest.mark.parametrize("impl", ["chunked", "recurrent", "attention=cudnn", "delta_rule=chunked,linear_scan=chunked"])
def test_what_ops_have_is_allowed(impl: str) -> None:
    assert complaint(impl) is None


def test_a_model_tells_its_ops() -> None:
    cfg = config("gla,attn", impl="linear_attention=pallas_gpu")
    plan = lm.blueprint(cfg)
    with pytest.raises(ValueError, match="linear_attention: impl = 'pallas_gpu' cannot serve"):
        jax.eval_shape(lambda key: plan.merge(plan.init(key))(tokens(1, 4)), jax.random.key(0))
