"""Scaling laws:  L(N, D) = E + A N^-α + B D^-β  (arXiv 2203.15556), of N parameters without embeddings and D tokens.

Fitted as in the paper: with a = ln A, b = ln B, e = ln E, the Huber loss (δ = 1e-3) of
log-sum-exp(a - α ln N, b - β ln D, e) - ln L, summed over the runs, by L-BFGS from a grid of starts. It is run to
convergence, the lack of which in the paper is what arXiv 2404.10102 found; for that, N, D and L are measured from
their geometric means, without which a and α are all but the same direction.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hydrax.core.build import ConfigError

DELTA = 1e-3
GRID = ((-1.5, -0.5, -0.1), (-4.0, -2.0, -0.7), (-4.0, -2.0, -0.7), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0))
"""Starts of the logs of E, A N^-α and B D^-β in the midst of the runs, less that of the loss; of α and β."""

BEST_STARTS = 8
"""Points of the grid that L-BFGS goes on from: those of lowest loss."""


@dataclasses.dataclass(frozen=True)
class Law:
    """L(N, D) = E + A N^-alpha + B D^-beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, N: npt.ArrayLike, D: npt.ArrayLike) -> np.ndarray:
        """Nats per token."""
        n, d = np.asarray(N, np.float64), np.asarray(D, np.float64)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def tokens(self, N: npt.ArrayLike, loss: npt.ArrayLike) -> np.ndarray:
        """Tokens after which N parameters reach a loss; infinite where they never do."""
        rest = np.asarray(loss, np.float64) - self.E - self.A * np.asarray(N, np.float64) ** -self.alpha
        with np.errstate(divide="ignore"):
            return np.where(rest > 0, (self.B / np.maximum(rest, 0.0)) ** (1 / self.beta), np.inf)


PUBLISHED = {
    "2203.15556": Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    "2404.10102": Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
}
"""Of the paper, and of its replication, by arXiv number."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law, how far it is from the runs, and its intervals."""

    law: Law
    residual: float  # largest |predicted / measured - 1|
    low: Law | None = None  # of every constant on its own, the ends of the bootstrap interval
    high: Law | None = None


def fit(
    N: npt.ArrayLike,
    D: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    resamples: int = 0,
    confidence: float = 0.95,
    seed: int = 0,
) -> Fit:
    """The law of runs with N[i] parameters, D[i] tokens and loss[i] nats per token.

    Args:
      resamples: of the bootstrap over runs, for intervals of that confidence; 0: none.

    Raises:
      ConfigError: fewer runs than constants, or of one size or one number of tokens.
    """
    n, d, measured = (np.asarray(x, np.float64).ravel() for x in (N, D, loss))
    if len(n) < 6 or len(np.unique(n)) < 2 or len(np.unique(d)) < 2:
        sizes = f"{len(n)} runs, {len(np.unique(n))} sizes, {len(np.unique(d))} numbers of tokens"
        raise ConfigError("runs", sizes, "expected at least 6 runs, 2 sizes and 2 numbers of tokens for 5 constants")
    if min(x.min() for x in (n, d, measured)) <= 0:
        raise ConfigError("runs", "", "expected positive parameters, tokens and losses")
    logs = np.log(np.stack([n, d, measured]))
    centre = logs.mean(1)
    best = _minimise(logs - centre[:, None], _starts(logs - centre[:, None]))
    law = _law(best, centre)
    found = Fit(law, float(np.max(np.abs(law(n, d) / measured - 1))))
    if not resamples:
        return found
    rng = np.random.default_rng(seed)
    drawn = (_resampled(logs - centre[:, None], rng) for _ in range(resamples))
    constants = np.array([dataclasses.astuple(_law(_minimise(sample, [best]), centre)) for sample in drawn])
    low, high = np.quantile(constants, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return dataclasses.replace(found, low=Law(*low.tolist()), high=Law(*high.tolist()))


def token_ratio(law: Law, reference: Law, N: npt.ArrayLike, D: npt.ArrayLike) -> np.ndarray:
    """Tokens that `law` needs, relative to the D of `reference`, for the loss that it has with N parameters."""
    return law.tokens(N, reference(N, D)) / np.asarray(D, np.float64)


def _law(x: np.ndarray, centre: np.ndarray) -> Law:
    """The law of (e, a, b, α, β), of logs less `centre`."""
    e, a, b, alpha, beta = x.tolist()
    n, d, loss = centre.tolist()
    return Law(math.exp(e + loss), math.exp(a + loss + alpha * n), math.exp(b + loss + beta * d), alpha, beta)


def _objective(x: np.ndarray, logs: np.ndarray) -> tuple[float, np.ndarray]:
    """The loss at (e, a, b, α, β), and its gradient."""
    e, a, b, alpha, beta = x
    n, d, measured = logs
    terms = np.stack([np.full_like(n, e), a - alpha * n, b - beta * d])
    top = terms.max(0)
    weights = np.exp(terms - top)
    total = weights.sum(0)
    r = top + np.log(total) - measured
    size = np.abs(r)
    value = np.where(size <= DELTA, r**2 / 2, DELTA * (size - DELTA / 2)).sum()
    g_e, g_a, g_b = weights / total * np.clip(r, -DELTA, DELTA)
    return float(value), np.array([g_e.sum(), g_a.sum(), g_b.sum(), -(g_a * n).sum(), -(g_b * d).sum()])


def _starts(logs: np.ndarray) -> list[np.ndarray]:
    grid = [np.array(point) for point in itertools.product(*GRID)]
    return sorted(grid, key=lambda x: _objective(x, logs)[0])[:BEST_STARTS]


def _minimise(logs: np.ndarray, starts: Sequence[np.ndarray]) -> np.ndarray:
    from scipy.optimize import minimize  # a third of a second to import

    # Scaled up, since the loss is of the order of DELTA² and L-BFGS stops at gradients of fixed size.
    def scaled(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _objective(x, logs)
        return value / DELTA**2, gradient / DELTA**2

    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-8, "maxcor": 5}  # as many as constants
    results = [minimize(scaled, start, jac=True, method="L-BFGS-B", options=options) for start in starts]
    return np.asarray(min(results, key=lambda result: result.fun).x)


def _resampled(logs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Runs drawn with replacement, again where they would be of a single size or number of tokens."""
    while True:
        drawn = logs[:, rng.integers(0, logs.shape[1], logs.shape[1])]
        if all(len(np.unique(row)) > 1 for row in drawn[:2]):
            return drawn
