"""Attention and its gradients from the paper's formulas, in numpy: the answer tests compare with.

Written from the semantics clauses alone; it shares no code with the library. `exact` works in
float64 on the inputs as rounded to the test dtype; `low_precision` does the same mathematics in
another order and rounds every intermediate to the test dtype, which says how far a correct kernel
may be off.
"""

import dataclasses

import numpy as np
from support.case import Case

HALF = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Mask:
    """What hides keys, as plain arrays; absent ones are None."""

    lengths_q: np.ndarray | None = None
    lengths_k: np.ndarray | None = None
    ids_q: np.ndarray | None = None
    ids_k: np.ndarray | None = None
    lo: np.ndarray | None = None
    hi: np.ndarray | None = None


def _documents(ids: np.ndarray) -> list[tuple[tuple[int, int] | None, int, int]]:
    """Per position: (id, how many earlier runs have that id) or None, place in run, run length."""
    result, seen, at = [], {}, 0
    while at < len(ids):
        end = at
        while end < len(ids) and ids[end] == ids[at]:
            end += 1
        id_ = int(ids[at])
        name = None if id_ == 0 else (id_, seen.get(id_, 0))
        seen[id_] = seen.get(id_, 0) + 1
        result += [(name, n, end - at) for n in range(end - at)]
        at = end
    return result


def _window(distance: np.ndarray, causal: bool, left, right) -> np.ndarray:
    """S1, S2 for distance = j - (i + off)."""
    see = np.ones_like(distance, bool)
    if causal:
        see &= distance <= 0
    if left is not None:
        see &= distance >= -left
    if right is not None:
        see &= distance <= right
    return see


def _see_documents(ids_q, ids_k, causal, left, right) -> np.ndarray:
    """S6: one row of the batch."""
    q, k = _documents(ids_q), _documents(ids_k)
    labels = {name: n for n, name in enumerate(dict.fromkeys(x[0] for x in (*q, *k)))}
    q_name, k_name = (np.array([labels[x[0]] for x in side], int) for side in (q, k))
    q_at, k_at = (np.array([x[1] for x in side], int) for side in (q, k))
    q_len, k_len = (np.array([x[2] for x in side], int) for side in (q, k))
    real = np.array([x[0] is not None for x in q], bool)
    off = k_len[None] - q_len[:, None]
    distance = k_at[None] - (q_at[:, None] + off)
    same = (q_name[:, None] == k_name[None]) & real[:, None]
    return same & _window(distance, causal, left, right)


def visible(case: Case, mask: Mask) -> np.ndarray:
    """The matrix [b, sq, sk] of who sees whom (S1, S2, S6 and lengths)."""
    i, j = np.arange(case.sq)[:, None], np.arange(case.sk)[None]
    see = np.zeros((case.b, case.sq, case.sk), bool)
    for b in range(case.b):
        length_q = case.sq if mask.lengths_q is None else min(max(mask.lengths_q[b], 0), case.sq)
        length_k = case.sk if mask.lengths_k is None else min(max(mask.lengths_k[b], 0), case.sk)
        if mask.ids_q is None:
            distance = j - (i + length_k - length_q)
            see[b] = _window(distance, case.causal, case.left, case.right)
        else:
            ids_q = np.where(np.arange(case.sq) < length_q, mask.ids_q[b], 0)
            ids_k = np.where(np.arange(case.sk) < length_k, mask.ids_k[b], 0)
            see[b] = _see_documents(ids_q, ids_k, case.causal, case.left, case.right)
        see[b] &= (i < length_q) & (j < length_k)
        if mask.lo is not None:
            row = b if len(mask.lo) > 1 else 0
            see[b] &= (mask.lo[row][:, None] <= j) & (j < mask.hi[row][:, None])
    return see


def rounder(dtype):
    """Rounds to a dtype and widens again, to float32 or, for float64, not at all."""
    dtype = np.dtype(dtype)
    wide = np.float64 if dtype == np.float64 else np.float32
    return lambda x: np.asarray(x).astype(dtype).astype(wide)


def _rows(x):
    """[b, s, h, d] to [b, h, s, d]."""
    return np.swapaxes(x, 1, 2)


def _grouped(x, heads: int):
    """Sums query heads that share a key head; [b, hq, s, d] to [b, s, hk, d]."""
    b, hq, s, d = x.shape
    return _rows(x.reshape(b, heads, hq // max(heads, 1), s, d).sum(2))


def _softmax(score, see):
    """Probabilities and log-sum-exp of the visible scores; S11 for rows that see nothing."""
    sees_any = see.any(-1, keepdims=True)
    score = np.where(see, score, -np.inf)
    top = np.where(sees_any, score.max(-1, keepdims=True, initial=-np.inf), 0)
    weight = np.where(see, np.exp(score - top), 0)
    total = np.where(sees_any, weight.sum(-1, keepdims=True), 1)
    return weight / total, np.where(sees_any, top + np.log(total), -np.inf)[..., 0]


def attention(arrays: dict, see: np.ndarray, scale: float, *, low: bool = False) -> dict:
    """out, lse, dq, dk, dv of arrays query, key, value, dout, dlse.

    Gradients by hand: with delta = rowsum(dO * O) - dlse (S10),
      dV = P^T dO,  dP = dO V^T,  dS = P * (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q.
    """
    dtype = arrays["query"].dtype
    wide = np.float32 if low and dtype != np.float64 else np.float64
    q, k, v, dout = (_rows(arrays[n].astype(wide)) for n in ("query", "key", "value", "dout"))
    dlse = arrays["dlse"].astype(wide)
    heads, repeat = k.shape[1], q.shape[1] // max(k.shape[1], 1)
    if low:  # another summation order
        round_ = rounder(dtype)
        q, k = (np.ascontiguousarray(x[..., ::-1]) for x in (q, k))
    else:
        round_ = lambda x: x  # noqa: E731
    k, v = (np.repeat(x, repeat, axis=1) for x in (k, v))
    transposed = lambda x: np.swapaxes(x, -1, -2)  # noqa: E731

    score = round_(round_(q * wide(scale)) @ transposed(k))
    p, lse = _softmax(score, see[:, None])
    p = round_(p)
    out = round_(p @ v)
    delta = (dout * out).sum(-1) - dlse
    dp = round_(dout @ transposed(v))
    # A hidden pair has no gradient, whatever cotangent an empty row's lse gets.
    ds = np.where(see[:, None], round_(p * (dp - delta[..., None])), 0)
    dq, dk = wide(scale) * (ds @ k), wide(scale) * (transposed(ds) @ q)
    if low:
        dq, dk = dq[..., ::-1], dk[..., ::-1]
    result = {
        "out": _rows(out),
        "lse": lse,
        "dq": round_(_rows(dq)),
        "dk": round_(_grouped(dk, heads)),
        "dv": round_(_grouped(transposed(p) @ dout, heads)),
    }
    return {name: np.asarray(x, np.float64) for name, x in result.items()}


def rounding_floors(arrays: dict, see: np.ndarray, scale: float) -> dict:
    """How far a correct kernel may be off even where the low-precision answer is lucky.

    Sums may run in any order, scores carry rounding into P, dP - delta cancels, and delta is made
    from an out that is rounded to the test dtype.
    """
    dtype = arrays["query"].dtype
    step = 16 * 2.0**-52 if dtype == np.float64 else 2.0**-23
    eps = 2.0 ** -(7 if dtype.name == "bfloat16" else np.finfo(dtype).nmant)
    q, k, v, dout = (_rows(arrays[n].astype(np.float64)) for n in ("query", "key", "value", "dout"))
    heads, repeat = k.shape[1], q.shape[1] // max(k.shape[1], 1)
    k, v = (np.repeat(x, repeat, axis=1) for x in (k, v))
    transposed = lambda x: np.swapaxes(x, -1, -2)  # noqa: E731
    p, _ = _softmax(scale * (q @ transposed(k)), see[:, None])
    term = np.abs(p @ v) * np.abs(dout)  # of delta
    q, k, v, dout = (np.abs(x) for x in (q, k, v, dout))

    score = np.where(see[:, None], abs(scale) * (q @ transposed(k)), 0)  # size of its terms
    dp = dout @ transposed(v) + term.sum(-1, keepdims=True)
    p_noise = 2 * step * p * (2 + score)
    ds = p_noise * dp + 2 * step * p * dp
    ds += p * eps * np.sqrt((term**2).sum(-1, keepdims=True))
    floors = {
        "out": p_noise @ v,
        "lse": 4 * step * score,
        "dq": abs(scale) * (ds @ k),
        "dk": abs(scale) * _grouped(transposed(ds) @ q, heads),
        "dv": _grouped(transposed(p_noise) @ dout, heads),
    }
    return {name: float(x.max(initial=0)) for name, x in floors.items()}
