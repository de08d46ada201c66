"""Comparisons under the one table of tolerances, `hydrax.eval.tolerances`."""

from collections.abc import Callable

import jax
import numpy as np

from hydrax.core.typing import ArrayLike, PyTree
from hydrax.eval.tolerances import FLOOR, TOLERANCE, relative_rms

__all__ = ["TOLERANCE", "assert_close", "assert_equal", "assert_slopes", "assert_trees_close"]


def assert_close(name: str, actual: ArrayLike, expected: ArrayLike, tolerance: float, *, floor: float = FLOOR) -> None:
    """rms(actual - expected) <= tolerance · max(rms(expected), floor), for finite tensors of one shape.

    `floor` is the size below which a reference counts as zero. Raise it only where the reference vanishes
    mathematically and consists of rounding (e.g. the gradient of a shift under a softmax), and say so there.

    Raises:
      AssertionError: naming the tensor, its error and where it is worst.
    """
    a, e = _fp64(actual), _fp64(expected)
    assert a.shape == e.shape, f"{name}: shape {a.shape}, expected {e.shape}"
    if a.size == 0:
        return
    for who, x in (("actual", a), ("expected", e)):
        bad = ~np.isfinite(x)
        assert not bad.any(), f"{name}: {who} has {bad.sum()} of {x.size} entries not finite, first at {_index(bad)}"
    error, rms = relative_rms(a, e, floor), np.sqrt(np.mean(e**2))
    worst = _index(np.abs(a - e))
    assert error <= tolerance, (
        f"{name} {a.shape}: relative RMS {error:.2e} > {tolerance:.0e} (rms expected {rms:.2e}); "
        f"worst at {worst}: {a[worst]:.6g}, expected {e[worst]:.6g}"
    )


def assert_trees_close(name: str, actual: PyTree, expected: PyTree, tolerance: float, *, floor: float = FLOOR) -> None:
    """`assert_close` leaf by leaf; the message names the path of the leaf."""
    a, e = jax.tree_util.tree_flatten_with_path(actual)[0], jax.tree_util.tree_flatten_with_path(expected)[0]
    assert [p for p, _ in a] == [p for p, _ in e], f"{name}: the trees differ in structure"
    for (path, x), (_, y) in zip(a, e, strict=True):
        assert_close(f"{name} {jax.tree_util.keystr(path)}", x, y, tolerance, floor=floor)


def assert_slopes(
    f: Callable[[dict[str, np.ndarray]], float],
    given: dict[str, np.ndarray],
    gradients: dict[str, ArrayLike],
    tolerance: float,
) -> None:
    """∂f(given) of every input, in fp64: along a random direction it is a central difference of f."""
    for name, gradient in gradients.items():
        direction, step = np.random.default_rng(7).standard_normal(np.shape(gradient)), 1e-5
        ends = (f(given | {name: given[name] + by * direction}) for by in (step, -step))
        slope = float(np.subtract(*ends)) / (2 * step)
        assert_close(f"gradient of {name}", np.sum(_fp64(gradient) * direction), slope, tolerance)


def assert_equal(name: str, actual: ArrayLike, expected: ArrayLike) -> None:
    """Bit-equal tensors of one shape.

    Raises:
      AssertionError: naming the tensor and the first difference.
    """
    a, e = _fp64(actual), _fp64(expected)
    assert a.shape == e.shape, f"{name}: shape {a.shape}, expected {e.shape}"
    differs = ~((a == e) | (np.isnan(a) & np.isnan(e)))
    first = _index(differs)
    assert not differs.any(), (
        f"{name}: {differs.sum()} of {a.size} differ, first at {first}: {a[first]!r} != {e[first]!r}"
    )


def _fp64(x: ArrayLike) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _index(x: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(np.argmax(x), x.shape)) if x.size else ()
