"""The same ops of flash-linear-attention (https://github.com/fla-org/flash-linear-attention), where it is installed."""

import functools
import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hydrax.eval.kernels import LOW, Problem, Shape

OPS = {
    "simple_gla": ("fla.ops.simple_gla", "chunk_simple_gla"),
    "gla": ("fla.ops.gla", "chunk_gla"),
    "delta_rule": ("fla.ops.delta_rule", "chunk_delta_rule"),
    "gated_delta_rule": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "kda": ("fla.ops.kda", "chunk_kda"),
}
"""Module and function by the peer's name of a problem."""


def facts() -> dict[str, Any]:
    """The device, and versions."""
    import fla
    import torch
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "fla": fla.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def evaluate(problem: Problem, shape: Shape) -> dict[str, np.ndarray]:
    """The output and gradients."""
    x, do = _inputs(problem, shape)
    o, gradients = _pull(problem, x, do)
    results = {"o": o, **{f"d{name}": a for name, a in gradients.items()}}
    return {name: a.float().cpu().numpy() for name, a in results.items()}


def sample(problem: Problem, shape: Shape, name: str, calls: int) -> float:
    """Seconds per call of a pass. Gradients that the library refuses for wrong results are timed all the same."""
    import fla.ops.common.chunk_o
    import torch

    fla.ops.common.chunk_o.TRITON_ABOVE_3_7_1 = True  # its guard, which `evaluate` leaves alone
    try:
        call = _program(problem, shape)[name]
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / calls
    finally:
        fla.ops.common.chunk_o.TRITON_ABOVE_3_7_1 = _guarded()


def _guarded() -> bool:
    import fla.utils

    return fla.utils.TRITON_ABOVE_3_7_1


def _inputs(problem: Problem, shape: Shape) -> tuple[dict[str, Any], Any]:
    import torch

    x = {
        n: torch.tensor(a, device="cuda", dtype=torch.bfloat16 if n in LOW else torch.float32)
        for n, a in problem.inputs(shape).items()
    }
    for name in problem.learned(x):
        x[name].requires_grad_()
    return x, torch.tensor(problem.cotangent(shape), device="cuda", dtype=torch.bfloat16)


def _forward(problem: Problem, x: dict[str, Any]) -> Any:
    """The output; a constant decay has a name of its own."""
    module, function = OPS[problem.peer or ""]
    names = {"log_decay": "g_gamma" if problem.decay == "constant" else "g"}
    return getattr(importlib.import_module(module), function)(**{names.get(n, n): a for n, a in x.items()})[0]


def _pull(problem: Problem, x: dict[str, Any], do: Any) -> tuple[Any, dict[str, Any]]:
    import torch

    o, names = _forward(problem, x), problem.learned(x)
    return o, dict(zip(names, torch.autograd.grad(o, [x[name] for name in names], do), strict=True))


@functools.lru_cache(1)
def _program(problem: Problem, shape: Shape) -> dict[str, Callable[[], Any]]:
    """The passes, tuned and called once; the last problem makes room."""
    x, do = _inputs(problem, shape)
    calls: dict[str, Callable[[], Any]] = {
        "forward": functools.partial(_forward, problem, x),
        "forward_backward": functools.partial(_pull, problem, x, do),
    }
    for call in calls.values():
        call()
    return calls
