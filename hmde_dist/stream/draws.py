"""Random numbers that are functions of what they decide: `uniform(seed, "what", epoch, groups)`.

No generator has a state that could be lost, and numbers do not depend on the order in which they are asked for, on the
number of processes, or on numpy's version (`numpy.random` may change its streams between releases).

The mixing is SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014), chained over the arguments.
"""

import zlib

import numpy as np

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def bits(seed: int, what: str, *keys) -> np.ndarray:
    """64 random bits (uint64) for each element of the keys, which are integers or integer arrays that broadcast."""
    state = _mix(np.array([seed % (1 << 64)], dtype=np.uint64))
    for key in (zlib.crc32(what.encode()), *keys):
        state = _mix(state ^ np.asarray(key).astype(np.uint64))
    return state


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + _INCREMENT
    state ^= state >> np.uint64(30)
    state *= _FIRST
    state ^= state >> np.uint64(27)
    state *= _SECOND
    state ^= state >> np.uint64(31)
    return state


def uniform(seed: int, what: str, *keys) -> np.ndarray:
    """Numbers in (0, 1), never 0 or 1."""
    return ((bits(seed, what, *keys) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def order(seed: int, what: str, keys: np.ndarray, *more) -> np.ndarray:
    """A random order: the positions of `keys` by their bits, ties by position."""
    # 32 bits sort twice as fast as 64, and ties do no harm.
    high = (bits(seed, what, *more, keys) >> np.uint64(32)).astype(np.uint32)
    return np.argsort(high, kind="stable")
