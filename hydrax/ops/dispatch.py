"""Choosing an implementation: `impl=None` picks one and says so once; a name that cannot serve raises.

Where ops are called by a model, one `impl` reaches all of them. It is either a form that all of them have ("chunked"),
or says which form which op takes ("delta_rule=chunked, linear_scan=chunked"); the others then choose for themselves.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging

from hydrax.core.typing import Array

KERNEL = "kernel"
"""Name of what hand-written kernels leave for the backward pass, for `jax.checkpoint` to keep instead of running them
again."""


def select(op: str, impl: str | None, forms: Mapping[str, Callable], default: str, shape: tuple) -> Callable:
    """The form of the op that `impl` names, or `forms[default]` if it names none (logged once per op and shape).

    Raises:
      ValueError: `impl` names nothing this op has.
    """
    impl = named(op, impl)
    if impl is None:
        _log_choice(op, default, shape)
        return forms[default]
    if impl not in forms:
        raise ValueError(f"{op}: impl = {impl!r}: expected one of {', '.join(forms)}, or None to choose")
    return forms[impl]


def named(op: str, impl: str | None) -> str | None:
    """The form that `impl` names for an op, None if it leaves the choice to it."""
    if impl is None or "=" not in impl:
        return impl
    return choices(impl).get(op)


def choices(impl: str) -> dict[str, str]:
    """Op -> form of "op=form, op=form"."""
    pairs = (pair.partition("=") for pair in impl.split(","))
    return {op.strip(): form.strip() for op, _, form in pairs}


@functools.cache
def _log_choice(op: str, impl: str, shape: tuple) -> None:
    logging.info("%s %s runs as %r", op, shape, impl)


def select_fast(
    op: str,
    impl: str | None,
    forms: Mapping[str, Callable],
    kernels: str,
    x: Array,
    *others: Array | None,
    step: str | None = None,
) -> Callable:
    """`select` where there is a module of Hopper kernels: by default they run if they serve x [B,T,...] and the others.

    Not on several devices, over which nothing would divide them, but inside a `jax.shard_map` over all axes of a mesh.
    One token takes the kernel of the module `step`, or else the definition.

    Raises:
      ValueError: `impl` names nothing this op has, or the kernels, which cannot serve.
    """
    single = x.shape[1] == 1
    refusal = hopper_refusal((single and step) or kernels, x, *others)
    unserved = refusal or not on_one_device() or (single and not step)
    default = ("recurrent" if single else "chunked") if unserved else "pallas_gpu"
    form = select(op, impl, forms, default, x.shape)
    if refusal and form is forms["pallas_gpu"]:
        raise ValueError(f"{op}: impl = 'pallas_gpu' cannot serve: {refusal}")
    return form


def on_one_device() -> bool:
    """Whether arrays lie on one device: there are no others, or a `jax.shard_map` has divided all axes of its mesh."""
    return jax.device_count() == 1 or jax.sharding.get_abstract_mesh().are_all_axes_manual


def hopper_refusal(kernels: str, *inputs: Any) -> str | None:
    """Why the kernels of a module cannot serve, or None. It is imported on GPUs only: JAX lacks them elsewhere."""
    if jax.default_backend() != "gpu":
        return f"the device is {jax.devices()[0].device_kind!r}: expected a Hopper GPU"
    return importlib.import_module(kernels).refusal(*inputs)
