"""A cache in numpy, as rows of each sequence, and the ways one lies in memory."""

import numpy as np

B, HQ, HK, D, CAPACITY, SIZE = 3, 4, 2, 32, 64, 16
LENGTHS = np.array([5, 33, 0], np.int32)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def tables(rotary_dim: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arange(CAPACITY)[:, None] * 100.0 ** (-np.arange(rotary_dim // 2) / rotary_dim)
    return np.cos(angle), np.sin(angle)


def turn(x, positions, rotary_dim, interleaved):
    """x [n, h, d] at positions [n], number by number."""
    x, out, half = x.copy(), x.copy(), rotary_dim // 2
    cos, sin = (t[positions] for t in tables(rotary_dim))
    for pair in range(half):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        c, s = cos[:, pair, None], sin[:, pair, None]
        out[..., i], out[..., j] = x[..., i] * c - x[..., j] * s, x[..., j] * c + x[..., i] * s
    return out


def one(
    q,
    k,
    v,
    first,
    causal=False,
    window_size=(-1, -1),
    softmax_scale=D**-0.5,
    softcap=np.inf,
    alibi_slopes=None,
    **_,
):
    """out, lse of q [sq, hq, d] over keys first, first + 1, ... of k, v [n, hk, d]."""
    (sq, hq, _), n = q.shape, len(k)
    left, right = (np.inf if side in (-1, None) else side for side in window_size)
    distance = np.arange(n) - (np.arange(sq)[:, None] + n - sq)
    see = (np.arange(n) >= first) & (distance >= -left) & (distance <= right)
    see &= (distance <= 0) | (not causal)
    q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
    k, v = (np.repeat(x, hq // len(x), axis=0) for x in (k, v))
    score = q @ k.swapaxes(1, 2) * softmax_scale
    score = score if softcap == np.inf else softcap * np.tanh(score / softcap)
    if alibi_slopes is not None:
        score = score - alibi_slopes[:, None, None] * np.abs(distance)
    score = np.where(see, score, -np.inf)
    top = np.where(see.any(-1), score.max(-1, initial=-np.inf), 0)
    weight = np.exp(score - top[..., None])
    with np.errstate(divide="ignore"):  # a row that sees nothing
        lse = top + np.log(weight.sum(-1))
    out = weight @ v / np.maximum(weight.sum(-1), 1e-300)[..., None]
    return out.swapaxes(0, 1), lse


def oracle(q, rows, new, lengths, leftpad=None, rotary=None, **features):
    """out, lse and what the rows [2, b, capacity, hk, d] of the cache hold afterwards."""
    rows, out = rows.copy(), np.zeros_like(q)
    lse = np.zeros((len(q), q.shape[2], q.shape[1]))
    moving = features.get("causal") or features.get("window_size", (-1, -1)) != (-1, -1)
    for b, start in enumerate(lengths):
        total, query = start, q[b]
        if new is not None:
            k, v = new[:, b]
            total = start + len(k)
            if rotary:
                k = turn(k, start + np.arange(len(k)), *rotary)
                steps = np.arange(len(query)) if moving else np.zeros(len(query), int)
                query = turn(query, start + steps, *rotary)
            rows[:, b, start:total] = k, v
        first = 0 if leftpad is None else leftpad[b]
        out[b], lse[b] = one(query, *rows[:, b, :total], first, **features)
    return out, lse, rows


class Contiguous:
    """Rows of the cache as they are, or at cache_batch_idx."""

    def __init__(self, indices=None):
        self.indices = np.arange(B) if indices is None else np.array(indices, np.int32)
        self.arguments = {} if indices is None else {"cache_batch_idx": self.indices}
        self.size = B if indices is None else 5

    def store(self, rows):
        cache = np.full((2, self.size, *rows.shape[2:]), np.nan)
        cache[:, self.indices] = rows
        return cache

    def load(self, cache):
        return cache[:, self.indices]


class Paged:
    """Rows of the cache in blocks, in any order, with NaN in blocks that nobody owns."""

    def __init__(self, capacity=CAPACITY):
        self.size = B * capacity // SIZE + 8
        order = np.random.default_rng(9).permutation(self.size)[: B * capacity // SIZE]
        self.table = order.reshape(B, -1).astype(np.int32)
        self.arguments = {"block_table": self.table}

    def store(self, rows):
        cache = np.full((2, self.size, SIZE, *rows.shape[3:]), np.nan)
        cache[:, self.table] = rows.reshape(2, B, -1, SIZE, *rows.shape[3:])
        return cache

    def load(self, cache):
        rows = cache[:, self.table]
        return rows.reshape(2, B, -1, *rows.shape[4:])


KINDS = {"plain": Contiguous, "indexed": lambda: Contiguous([4, 0, 2]), "paged": Paged}


def garbage_behind(rows, lengths):
    """NaN in what the cache does not hold yet."""
    rows = rows.copy()
    for b, length in enumerate(lengths):
        rows[:, b, length:] = np.nan
    return rows
