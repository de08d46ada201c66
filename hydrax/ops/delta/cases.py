"""Named shapes of `delta_rule`, shared by tests, tuning and benchmarks; its kernels meet those of `linear`."""

from hydrax.ops.linear.cases import KERNELS, Case

__all__ = ["CASES", "KERNELS", "Case"]

CASES = {
    "none": Case(2, 65, 2, 2, 8, 16, "none"),
    "constant": Case(2, 63, 2, 2, 8, 8, "constant"),
    "scalar": Case(2, 64, 2, 2, 8, 16, "scalar"),
    "scalar_grouped": Case(2, 65, 1, 4, 8, 8, "scalar"),
    "vector": Case(2, 65, 2, 2, 8, 16, "vector"),
    "vector_grouped": Case(1, 257, 2, 4, 8, 8, "vector"),
    "one_token": Case(2, 1, 2, 2, 8, 8, "scalar"),
}
