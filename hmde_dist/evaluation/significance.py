"""Whether two systems differ by more than chance: paired tests over queries, corrected for many comparisons, and
bootstrap intervals.

Systems are compared on the same queries, so every test here is paired (Smucker, Allan & Carterette 2007, CIKM, compare
them). Nothing here knows what the numbers measure.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 9999


def paired_tests(one: Sequence[float], other: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Difference of the means (`one` - `other`) of values of the same queries, with two-sided p-values.

    `p_randomisation` is of Fisher's test, which swaps the systems' values query by query (all 2^n ways if they are fewer
    than `RESAMPLES`, else so many drawn by `seed`); `p_t` of Student's paired t. Values that never differ give 1.
    """
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    if not difference.any():
        return {"difference": 0.0, "p_randomisation": 1.0, "p_t": 1.0}
    if len(difference) < 2:
        return {"difference": float(difference.mean()), "p_randomisation": 1.0, "p_t": 1.0}
    randomised = stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, (1 << 22) // len(difference)),
        rng=np.random.default_rng(seed),
    )
    # Differences that are all alike have no variance: t is infinite and its p zero, with a warning.
    with np.errstate(divide="ignore"):
        mean, error = difference.mean(), stats.sem(difference)
        t = abs(mean) / error if error > 0 else np.inf
    p_t = float(2 * stats.t.sf(t, len(difference) - 1))
    return {"difference": float(mean), "p_randomisation": float(randomised.pvalue), "p_t": p_t}


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected so that the chance of any false one among them stays below the level (Holm 1979)."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected.tolist()


def multiplicities(units: int, seed: int, resamples: int = 1000) -> np.ndarray:
    """How often each unit occurs in each bootstrap sample: [resamples, units], rows that sum to `units`."""
    random = np.random.default_rng(seed)
    return random.multinomial(units, np.full(units, 1 / units), size=resamples)


def interval(values: np.ndarray) -> list[float]:
    """The middle 95 % of bootstrap values (percentile interval)."""
    return np.quantile(values, [0.025, 0.975]).tolist()


def mean_interval(values: Sequence[float], seed: int = 0) -> list[float]:
    """95 % bootstrap interval of the mean of independent values."""
    values = np.asarray(values, dtype=np.float64)
    return interval(multiplicities(len(values), seed) @ values / len(values))


def t_interval(values: Sequence[float]) -> list[float] | None:
    """95 % interval of the mean of a few independent values, by Student's t; None for fewer than two."""
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return [float(np.mean(values) - half), float(np.mean(values) + half)]


def compare(values: dict[str, dict[str, np.ndarray]], subject: str) -> list[dict]:
    """Tests of system `subject` against every other on every part (a language pair), all corrected together.

    Args:
        values: system -> part -> values of its queries, in one order for all systems.
    """
    rows = [
        {"part": part, "against": other, **paired_tests(values[subject][part], values[other][part])}
        for other in values
        if other != subject
        for part in values[subject]
        if part in values[other]
    ]
    for test in ("randomisation", "t"):
        for row, p in zip(rows, holm([row[f"p_{test}"] for row in rows]), strict=True):
            row[f"p_{test}_holm"] = p
    return rows
