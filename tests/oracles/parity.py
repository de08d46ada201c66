"""One problem given to JAX and to PyTorch: outputs, final states, and the gradient of every input.

Both sides compute in fp32: every reference casts to it, so fp64 inputs would test nothing more.
"""

import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax import mixers
from hydrax.core.build import build
from hydrax.core.typing import PyTree
from hydrax.mixers import Mixer
from hydrax.models.spec import ModelConfig, resolve
from tests.tolerances import TOLERANCE, assert_close

torch: Any = pytest.importorskip("torch", reason="needs PyTorch: make oracles")

Params = Mapping[str, Any]
"""Weights by the reference's names, or by the paths of hydrax."""

D = 32

FORMS = pytest.mark.parametrize(
    "how", [{"impl": "recurrent"}, {"impl": "chunked", "chunk_size": 16}], ids=lambda how: how["impl"]
)


def naive(op: str) -> ModuleType:
    """The file `fla/ops/<op>/naive.py`, which needs torch and einops, whereas its package imports Triton."""
    try:
        path = importlib.metadata.distribution("fla-core").locate_file(f"fla/ops/{op}/naive.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs fla-core: make oracles")
    spec = importlib.util.spec_from_file_location(f"naive_{op}", pathlib.Path(str(path)))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(
    ours: Callable[..., PyTree],
    theirs: Callable[..., PyTree],
    inputs: Mapping[str, np.ndarray],
    tolerance: float = TOLERANCE["fp32_op"],
) -> None:
    """Every output of both for the same named inputs, and every input's gradient under random cotangents."""
    inputs = {name: np.asarray(x, np.float32) for name, x in inputs.items()}
    tensors = {name: torch.tensor(x, requires_grad=True) for name, x in inputs.items()}
    expected = jax.tree.leaves(theirs(**tensors))
    rng = np.random.default_rng(1)
    cotangents = [rng.normal(size=y.shape).astype(np.float32) for y in expected]
    torch.autograd.backward(expected, [torch.tensor(c) for c in cotangents])

    @jax.jit
    def run(inputs: dict, cotangents: list) -> tuple:
        outputs, pull = jax.vjp(lambda x: jax.tree.leaves(ours(**x)), inputs)
        return outputs, pull(cotangents)[0]

    outputs, gradients = run({n: jnp.asarray(x) for n, x in inputs.items()}, cotangents)
    assert len(outputs) == len(expected)
    for i, (y, reference) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(f"output {i}", y, reference.detach().numpy(), tolerance)
    for name, dx in gradients.items():
        assert_close(f"d{name}", dx, tensors[name].grad.numpy(), tolerance)


def assembler(mixer: str, options: Params) -> Callable[[Params], Mixer]:
    """Parameters by path -> the mixer, which must have exactly these."""
    graph, state = nnx.split(mixers.get(mixer)(D, resolved(mixer, options, D), rngs=nnx.Rngs(0)))
    wanted = {"/".join(map(str, path)): (path, p) for path, p in nnx.to_flat_state(state)}

    def assemble(given: Params) -> Mixer:
        check(given, {name: p for name, (_, p) in wanted.items()})
        return nnx.merge(graph, nnx.from_flat_state((path, p.replace(given[n])) for n, (path, p) in wanted.items()))

    return assemble


def check(given: Params, wanted: Params) -> None:
    """Every parameter is given, in its shape, and nothing else: a wrong one would be broadcast."""
    wrong = {(name, x.shape) for name, x in given.items()} ^ {(name, x.shape) for name, x in wanted.items()}
    assert not wrong, f"missing, superfluous or of another shape: {sorted(wrong)}"


def resolved(mixer: str, options: Params, d_model: int) -> mixers.MixerConfig:
    """The mixer's config in a model of that width."""
    return resolve(build(ModelConfig, {"d_model": d_model, "pattern": mixer, "mixers": {mixer: options}}))[0].options
