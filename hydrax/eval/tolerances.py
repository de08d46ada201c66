"""How far two results may be apart: the one table, by dtype and form. Loosening an entry needs a written reason."""

import numpy as np

from hydrax.core.typing import ArrayLike

TOLERANCE = {
    "fp64": 1e-9,  # two forms of whatever, in fp64: only their algebra can differ
    "fp32_op": 1e-5,  # one op or mixer: output, state and gradients
    "fft": 1e-7,  # a convolution by FFT in fp32: its largest error, and what later tokens do, over the norms |x| |k|
    "fp32_model": 1e-4,  # a whole model
    "bf16_output": 5e-3,
    "bf16_gradient": 1e-2,
    "bf16_gate_gradient": 2e-2,  # gradients that flow through an exponent: decays, betas, their projections
    "bf16_long": 2e-2,  # long rows, chained forms and whole models
}
"""Relative RMS per tensor, rms(actual - expected) / rms(expected)."""

EXPONENTS = ("dbeta", "dlog_decay", "dscore")
"""Gradients of ops that flow through an exponent; keys of score s get the bias e^s."""

FLOOR = 1e-6
"""The rms below which an expected tensor counts as zero."""


def relative_rms(actual: ArrayLike, expected: ArrayLike, floor: float = FLOOR) -> float:
    """rms(actual - expected) / max(rms(expected), floor), in fp64; nan if either is not finite."""
    a, e = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    with np.errstate(invalid="ignore"):
        error = np.sqrt(np.mean((a - e) ** 2)) / max(np.sqrt(np.mean(e**2)), floor)
    return float(error) if np.isfinite(error) else float("nan")


def op_tolerance(what: str, dtype: str) -> float:
    """For one tensor of an op whose values have that dtype: "o", "state", or "d<input>"."""
    if dtype == "float32":
        return TOLERANCE["fp32_op"]
    kinds = {"o": "output", "state": "output", **dict.fromkeys(EXPONENTS, "gate_gradient")}
    return TOLERANCE[f"bf16_{kinds.get(what, 'gradient')}"]
