"""Layers and models against transformers, with the same weights: `make oracles`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.typing import Array
from hydrax.mixers import Context
from hydrax.ops.linear import linear_attention
from hydrax.ops.scan import selective_scan
from tests.oracles.layers import HV, LAYERS, H, K, Layer, V, config_of, source_of, weights
from tests.oracles.models import MODELS, VOCABULARY, Model
from tests.oracles.parity import FORMS, D, compare, resolved, torch
from tests.tolerances import TOLERANCE, assert_close

pytestmark = pytest.mark.oracle

GDN_NAMES = {
    "heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "conv_width": "linear_conv_kernel_dim",
}
MAMBA_NAMES = {
    "value_dim": "intermediate_size",
    "key_dim": "state_size",
    "dt_rank": "time_step_rank",
    "conv_width": "conv_kernel",
}
MLA_NAMES = {
    "heads": "num_attention_heads",
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
}
RGLRU_NAMES = {"heads": "num_attention_heads", "value_dim": "head_dim", "conv_width": "conv1d_width"}
B, T = 2, 37
PREFIX = 21  # tokens before the first single step
TOKENS = np.random.default_rng(2).integers(0, VOCABULARY, (B, T))


@FORMS
def test_selective_scan(how: dict) -> None:
    rng = np.random.default_rng(0)
    x, dt = rng.normal(size=(2, B, T, D))
    b, c = rng.normal(size=(2, B, T, K))
    inputs = {"x": x, "dt": np.logaddexp(0, dt), "A": -rng.uniform(0.1, 4, (D, K)), "b": b, "c": c}

    def theirs(x: Any, dt: Any, A: Any, b: Any, c: Any) -> Any:
        scan = source_of("mamba").mamba_selective_scan
        x, dt, b, c = (y.transpose(1, 2) for y in (x, dt, b, c))
        y, h = scan(x, dt, A, b, c, return_last_state=True)
        return y.transpose(1, 2), h

    compare(lambda **x: selective_scan(**x, **how), theirs, inputs)


@FORMS
def test_state_space_duality(how: dict) -> None:
    """The chunks of Mamba-2 against linear attention with a scalar decay."""
    rng = np.random.default_rng(0)
    b, c = rng.normal(size=(2, B, T, H, K))
    inputs = {"x": rng.normal(size=(B, T, HV, V)), "dt": np.logaddexp(0, rng.normal(size=(B, T, HV)))}
    inputs |= {"A": -rng.uniform(0.1, 4, HV), "b": b, "c": c, "h": rng.normal(size=(B, HV, K, V))}

    def ours(x: Any, dt: Any, A: Any, b: Any, c: Any, h: Any) -> Any:
        return linear_attention(c, b, dt[..., None] * x, A * dt, scale=1.0, initial_state=h, **how)

    def theirs(x: Any, dt: Any, A: Any, b: Any, c: Any, h: Any) -> Any:
        scan = source_of("mamba2").mamba2_chunk_scan
        o, h = scan(x, dt, A, b, c, chunk_size=8, initial_states=h.transpose(2, 3), return_final_states=True)
        return o, h.transpose(2, 3)

    compare(ours, theirs, inputs)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Layer:
    return LAYERS[request.param]


def inputs() -> np.ndarray:
    """Small enough that the epsilon of an output norm counts."""
    return 0.1 * np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)


def test_layer(layer: Layer) -> None:
    """The output, and the gradients of the input and of every weight."""

    def ours(x: Array, **p: Array) -> Array:
        return layer.ours(p)(x, Context.of(x, layer_index=layer.index, depth=layer.depth))[0]

    def theirs(x: Any, **p: Any) -> Any:
        return layer.call(lambda *args, **more: torch.func.functional_call(layer.theirs, p, args, more), x, None)

    compare(ours, theirs, {"x": inputs(), **weights(layer.theirs)})


def test_decoding(layer: Layer) -> None:
    """Prefill, then one token at a time, each side with its own cache; the states agree at the end."""
    x = inputs()

    @jax.jit
    def decode(p: dict, x: Array) -> tuple:
        mixer = layer.ours(p)
        where = {"layer_index": layer.index, "depth": layer.depth}
        y, state = mixer(x[:, :PREFIX], Context.of(x[:, :PREFIX], **where), mixer.init_state(B, T, x.dtype))

        def step(state: Any, token: tuple) -> tuple:
            x_t, position = token
            y, state = mixer.step(x_t, Context(jnp.full((B, 1), position), **where), state)
            return state, y

        state, rest = jax.lax.scan(step, state, (x[:, PREFIX:].swapaxes(0, 1), jnp.arange(PREFIX, T)))
        return jnp.concatenate([y, rest.swapaxes(0, 1)], axis=1), state[layer.entry]

    y, memory = decode(weights(layer.theirs), x)
    cache, tensor = layer.cache(layer.settings), torch.tensor(x)
    with torch.no_grad():
        pieces = [tensor[:, :PREFIX], *tensor[:, PREFIX:].split(1, dim=1)]
        expected = torch.cat([layer.call(layer.theirs, piece, cache) for piece in pieces], dim=1)
        assert_close("prefill", y[:, :PREFIX], expected[:, :PREFIX].numpy(), TOLERANCE["fp32_op"])
        assert_close("steps", y[:, PREFIX:], expected[:, PREFIX:].numpy(), TOLERANCE["fp32_op"])
        assert_close(layer.entry, memory, layer.memory(cache, layer.index).numpy(), TOLERANCE["fp32_op"])


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]


def test_model(model: Model) -> None:
    """The logits, and their gradients with respect to every weight."""

    def theirs(**p: Any) -> Any:
        return torch.func.functional_call(model.theirs, p, (torch.tensor(TOKENS),)).logits

    compare(lambda **p: model.merge(p)(TOKENS), theirs, weights(model.theirs), TOLERANCE["fp32_model"])


def test_decoding_of_models(model: Model) -> None:
    """Prefill, then one token at a time, each side with its own cache."""

    @jax.jit
    def decode(p: dict, tokens: Array) -> Array:
        ours = model.merge(p)
        first, cache = ours.prefill(tokens[:, :PREFIX], ours.init_cache(B, T))

        def step(cache: Any, token: Array) -> tuple:
            logits, cache = ours.step(token, cache)
            return cache, logits

        _, rest = jax.lax.scan(step, cache, tokens[:, PREFIX:].T)
        return jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1)

    logits = decode(weights(model.theirs), TOKENS)
    cache = {model.cache: model.memory(model.settings), "use_cache": True}
    with torch.no_grad():
        pieces = [torch.tensor(TOKENS[:, :PREFIX]), *torch.tensor(TOKENS[:, PREFIX:]).split(1, dim=1)]
        expected = torch.cat([model.theirs(piece, **cache).logits for piece in pieces], dim=1).numpy()
    assert_close("prefill", logits[:, :PREFIX], expected[:, :PREFIX], TOLERANCE["fp32_model"])
    assert_close("steps", logits[:, PREFIX:], expected[:, PREFIX:], TOLERANCE["fp32_model"])


@pytest.mark.parametrize(
    ("family", "mixer", "preset", "names"),
    [
        ("qwen3_next", "gdn", {"preset": "qwen3next"}, {**GDN_NAMES, "norm_eps": "rms_norm_eps"}),
        ("olmo_hybrid", "gdn", {"preset": "olmo"}, {**GDN_NAMES, "allow_neg_eigval": "linear_allow_neg_eigval"}),
        ("mamba", "mamba", {}, MAMBA_NAMES),
        ("deepseek_v3", "mla", {"preset": "deepseek"}, MLA_NAMES),
        ("kimi_linear", "mla", {"preset": "kimi"}, MLA_NAMES),
        ("recurrent_gemma", "rglru", {"preset": "griffin"}, RGLRU_NAMES),
    ],
)
def test_sizes_of_published_models(family: str, mixer: str, preset: dict, names: dict) -> None:
    """A preset, or the defaults, at the published width; the defaults of transformers are the published config."""
    published = config_of(family)
    options = resolved(mixer, preset, published.hidden_size)
    assert {ours: getattr(options, ours) for ours in names} == {o: getattr(published, t) for o, t in names.items()}
