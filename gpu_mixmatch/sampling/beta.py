"""λ' = max(λ, 1 - λ), λ ~ Beta(α, α), by one uniform number through its quantile function."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import NDArray

from gpu_mixmatch._validation import as_number
from gpu_mixmatch.sampling.philox import Words


def folded_beta(words: Words, alpha: float) -> NDArray[np.float32]:
    """λ' = max(λ, 1 - λ), λ ~ Beta(α, α), from one word each."""
    quantile = _fitted(alpha)
    # 1 - u, exact in float64: the tail probability of λ'
    log2_tail = np.log2(1.0 - (words >> np.uint64(8)).astype(np.float64) * 2.0**-24)
    power = np.exp2(log2_tail / alpha)
    variable = power if quantile.of_power else np.sqrt(1.0 - log2_tail)
    variable = variable * quantile.scale + quantile.shift
    ratio = np.full_like(variable, quantile.coefficients[-1])
    for coefficient in quantile.coefficients[-2::-1]:
        ratio *= variable
        ratio += coefficient
    lam: NDArray[np.float32] = np.clip(1.0 - power * ratio, 0.5, 1.0).astype(np.float32)
    return lam


class FoldedBetaQuantile(NamedTuple):
    """λ' = 1 - w^(1/α) · p(x): the quantile of max(λ, 1 - λ) at 1 - w, in float64.

    Attributes:
        coefficients: Of the polynomial p, lowest power first.
        scale, shift: x = scale · y + shift lies in [-1, 1].
        of_power: y is w^(1/α) if true, else sqrt(1 - log2 w).
    """

    coefficients: tuple[float, ...]
    scale: float
    shift: float
    of_power: bool


def folded_beta_quantile(alpha: float) -> FoldedBetaQuantile:
    """Fit the quantile of max(λ, 1 - λ), λ ~ Beta(α, α), for tail probabilities w in [2^-24, 1].

    With t = 1 - λ' = 1 / (1 + e^2y) the density of y is proportional to sech(y)^(2α), which is
    smooth for every α: Gauss-Legendre sums over short intervals give w(t), and t / w^(1/α) is
    analytic in w^(1/α) at 0. For α > 1 that power crowds near 1 and sqrt(1 - log2 w), in which a
    normal tail is nearly straight, serves instead.

    Raises:
        TypeError: If α is no number.
        ValueError: If α is not in [0.05, 1000], or the fit misses by more than 1e-7.
    """
    return _fitted(as_number("alpha", alpha, least=0.05, most=1000))


@lru_cache(maxsize=16)
def _fitted(alpha: float) -> FoldedBetaQuantile:
    cells = 4000
    # beyond this end the mass is below e^-20 of the least tail that is drawn
    end = min((24 * np.log(2) + 20) / (2 * alpha) + 1, 12 / np.sqrt(alpha) + 37 / alpha)
    edges = end * np.linspace(0, 1, cells + 1) ** 2  # dense where λ' is near 0.5
    nodes, weights = np.polynomial.legendre.leggauss(8)
    half = np.diff(edges)[:, None] / 2
    points = edges[:-1, None] + half * (nodes + 1)
    log_sech = np.log(2.0) - points - np.log1p(np.exp(-2 * points))
    mass = (np.exp(2 * alpha * log_sech) * weights * half).sum(axis=1)
    tail = np.cumsum(mass[::-1])[::-1]
    log2_tail = np.log2(tail / tail[0])  # at edges[:-1]
    kept = log2_tail >= -24
    log2_tail, y = log2_tail[kept], edges[:-1][kept]

    power = np.exp2(log2_tail / alpha)
    small = np.exp(-2 * y) / (1 + np.exp(-2 * y))
    variable, limits = (power, (0.0, 1.0)) if alpha <= 1 else (np.sqrt(1 - log2_tail), (1.0, 5.0))
    fit = Chebyshev.fit(variable, small / power, deg=12 if alpha <= 1 else 18, domain=limits)
    polynomial = fit.convert(kind=Polynomial, domain=limits)
    error = np.abs(polynomial(variable) * power - small).max()
    if not error < 1e-7:
        raise ValueError(f"the quantile of Beta({alpha}, {alpha}) was fitted only to {error:.1e}")
    low, high = limits
    return FoldedBetaQuantile(
        tuple(map(float, polynomial.coef)),
        2 / (high - low),
        -(high + low) / (high - low),
        alpha <= 1,
    )
