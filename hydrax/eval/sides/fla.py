"""The same ops of flash-linear-attention (https://github.com/fla-org/flash-linear-attention), where it is installed.

At the first call of a kernel Triton compiles all its forms, one after another, and times them: minutes per op. So
several processes compile first, each its share of the forms and without running any (`compiling`), and leave them in
Triton's cache on disk. What was timed stays there as well.
"""

import contextlib
import functools
import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hydrax.eval.kernels import LOW, Problem, Shape
from hydrax.eval.sides.workers import Mine

os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")  # read when Triton is imported, here or in a process from here

OPS = {
    "simple_gla": ("fla.ops.simple_gla", "chunk_simple_gla"),
    "gla": ("fla.ops.gla", "chunk_gla"),
    "delta_rule": ("fla.ops.delta_rule", "chunk_delta_rule"),
    "gated_delta_rule": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "kda": ("fla.ops.kda", "chunk_kda"),
}
"""Module and function by the peer's name of a problem."""


TUNING = {"warmup": 2, "rep": 10}
"""Milliseconds of a form of a kernel when Triton compares them."""


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
    return {name: a.detach().float().cpu().numpy() for name, a in results.items()}


def sample(problem: Problem, shape: Shape, name: str, calls: int) -> float:
    """Seconds per call of a pass. Gradients that the library refuses for wrong results are timed all the same."""
    import torch

    with unguarded():
        call = _program(problem, shape)[name]
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / calls


def compile_share(problems: Sequence[Problem], shapes: Sequence[Shape], mine: Mine) -> None:
    """Compiles what is `mine` of the kernels of both passes. Forms depend on B, H and D, hardly on T."""
    for B, T, H, D in shapes:  # outside: of a second shape most is there when it is its turn
        for problem in problems:
            with compiling(mine), contextlib.suppress(Exception):  # it will be back when the problem is timed
                _pull(problem, *_inputs(problem, (B, min(T, 1024), H, D)))


@contextlib.contextmanager
def compiling(mine: Mine) -> Iterator[None]:
    """In there no kernel that Triton tunes is run. Those of its forms that are `mine` are compiled."""
    from triton.runtime.autotuner import Autotuner

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        given = _form(self.fn, {**self.nargs, **kwargs})
        for config in self.prune_configs(kwargs):
            if mine(f"{self.base_fn.__name__} {config} {given}"):
                with contextlib.suppress(Exception):  # too large for the device: Triton passes over it, too
                    self.fn.run(*args, **kwargs | config.all_kwargs() | {"warmup": True})

    run, Autotuner.run = Autotuner.run, compile_only
    try:
        with unguarded():
            yield
    finally:
        Autotuner.run = run


def _form(kernel: Any, arguments: dict[str, Any]) -> list[Any]:
    """What Triton compiles anew for: constants, types, and whether an integer is 1 or a multiple of 16."""
    while not hasattr(kernel, "params"):
        kernel = kernel.fn
    found: list[Any] = []
    for p in kernel.params:
        x = arguments.get(p.name)
        if isinstance(x, int) and not p.is_constexpr:
            x = p.do_not_specialize or (x == 1, x % 16 == 0)
        found.append(getattr(x, "dtype", x))
    return found


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """In there gradients are computed even where the library knows that this Triton gets them wrong."""
    import fla.ops.common.chunk_o as guarded
    import fla.utils

    guarded.TRITON_ABOVE_3_7_1 = True
    try:
        yield
    finally:
        guarded.TRITON_ABOVE_3_7_1 = fla.utils.TRITON_ABOVE_3_7_1


def quick_tuning() -> None:
    """From now on Triton times each form for `TUNING` milliseconds instead of 25 and 100."""
    import triton.testing
    from triton.runtime.autotuner import Autotuner

    Autotuner.do_bench = staticmethod(functools.partial(triton.testing.do_bench, **TUNING))


def _inputs(problem: Problem, shape: Shape) -> tuple[dict[str, Any], Any]:
    import torch

    quick_tuning()
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
