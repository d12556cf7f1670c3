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


def positions(case: Case, mask: Mask) -> np.ndarray:
    """The key coordinate [b, sq] that each row is aligned with (S2, S6), in packed coordinates."""
    result = np.zeros((case.b, case.sq), int)
    for b in range(case.b):
        length_q = case.sq if mask.lengths_q is None else min(max(mask.lengths_q[b], 0), case.sq)
        length_k = case.sk if mask.lengths_k is None else min(max(mask.lengths_k[b], 0), case.sk)
        if mask.ids_q is None:
            result[b] = np.arange(case.sq) + length_k - length_q
            continue
        ids_q = np.where(np.arange(case.sq) < length_q, mask.ids_q[b], 0)
        ids_k = np.where(np.arange(case.sk) < length_k, mask.ids_k[b], 0)
        ends = {}  # of the key runs; a later key of a run overwrites an earlier one
        for j, (name, _, _) in enumerate(_documents(ids_k)):
            ends[name] = j + 1
        for i, (name, at, length) in enumerate(_documents(ids_q)):
            result[b, i] = ends.get(name, 0) - (length - at)
    return result


@dataclasses.dataclass(frozen=True)
class Features:
    """What changes scores and probabilities, as plain arrays; absent ones are None."""

    position: np.ndarray | None = None  # [b, sq]
    softcap: float | None = None
    slopes: np.ndarray | None = None  # [b, hq]
    sinks: np.ndarray | None = None  # [hq]
    bias: np.ndarray | None = None  # [b or 1, hq or 1, sq or 1, sk or 1]
    keep: np.ndarray | None = None  # bool [b, hq, sq, sk]
    threshold: int = 65536

    def factor(self, wide) -> np.ndarray | float:
        """What probabilities are multiplied with (S12)."""
        if self.keep is None:
            return 1.0
        return np.where(self.keep, wide(65536 / max(self.threshold, 1)), wide(0))

    def added(self, sk: int, wide) -> np.ndarray | float:
        """What is added to scores behind the softcap (S8, S9)."""
        total = 0.0
        if self.slopes is not None:
            distance = np.abs(self.position[:, None, :, None] - np.arange(sk)).astype(wide)
            total = -self.slopes[:, :, None, None].astype(wide) * distance
        return total if self.bias is None else total + self.bias.astype(wide)


NOTHING = Features()


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox 4x32-10 (Salmon et al. 2011), in 64-bit arithmetic: [..., 4] and [..., 2] of words."""
    word = np.uint64(0xFFFFFFFF)
    x = [counter[..., n].astype(np.uint64) for n in range(4)]
    k = [key[..., n].astype(np.uint64) for n in range(2)]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        high, low = (a >> np.uint64(32), b >> np.uint64(32)), (a & word, b & word)
        x = [high[1] ^ x[1] ^ k[0], low[1], high[0] ^ x[3] ^ k[1], low[0]]
        k = [(k[0] + np.uint64(0x9E3779B9)) & word, (k[1] + np.uint64(0xBB67AE85)) & word]
    return np.stack(x, -1).astype(np.uint32)


def keep(key: np.ndarray, arrays: dict, sizes: tuple[int, int, int]) -> np.ndarray:
    """S12, written out: the kept scores [b, hq, sq, sk] of a call's positions and threshold."""
    b, hq, sk = sizes
    i = (arrays["position"] % 2**32)[:, None, :, None, None]
    j = np.arange(sk)
    column, shared = j % 32, 2**31 + j // 1024 * 2
    calls = np.stack([j // 128, shared, shared + 1], -1)
    batch, head = np.arange(b)[:, None, None, None, None], np.arange(hq)[:, None, None, None]
    parts = np.broadcast_arrays(i, calls, batch, head)
    words = philox(np.stack(parts, -1), np.broadcast_to(key, (*parts[0].shape, 2)))
    own = np.take_along_axis(
        words[..., 0, :], np.broadcast_to((j // 32 % 4)[:, None], (*words.shape[:-2], 1)), -1
    )
    common = words[..., 1:, :].reshape(*words.shape[:-2], 8)

    def bits(x, on):  # of the column that many further on, round a word
        return x >> ((column + on) % 32).astype(np.uint32)[:, None] & np.uint32(1)

    mixed = [bits(common[..., n : n + 1], 0) ^ bits(own, 4 * n + 4) for n in range(7)]
    number = np.concatenate([bits(own, 0), *mixed, bits(common, 2)], -1) @ (
        1 << np.arange(16)[::-1]
    )
    return number < arrays["threshold"]


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


def _softmax(score, see, sinks=None):
    """Probabilities and log-sum-exp of the visible scores; S11 for rows that see nothing."""
    score = np.where(see, score, -np.inf)
    top = score.max(-1, keepdims=True, initial=-np.inf)
    sees_any = see.any(-1, keepdims=True) & ~np.isneginf(top)
    if sinks is not None:
        sinks = sinks[:, None, None].astype(score.dtype)
        top = np.maximum(top, sinks)
    top = np.where(sees_any, top, 0)
    weight = np.where(see, np.exp(score - top), 0)
    total = weight.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - top)
    total = np.where(sees_any, total, 1)
    return weight / total, np.where(sees_any, top + np.log(total), -np.inf)[..., 0]


def reduced_to(x: np.ndarray, shape: tuple, reduce) -> np.ndarray:
    """x reduced over the axes along which shape is 1, after broadcasting it to the others."""
    x = np.broadcast_to(x, np.broadcast_shapes(x.shape, shape))
    axes = tuple(a for a, n in enumerate(shape) if n == 1)
    return reduce(x, axis=axes, keepdims=True) if axes else x


def _feature_gradients(features: Features, ds, lse, delta) -> dict:
    """dbias and dsinks from dS behind the softcap (S8, S15)."""
    found = {}
    if features.bias is not None:
        found["dbias"] = reduced_to(ds, features.bias.shape, np.sum)
    if features.sinks is not None:
        share = np.exp(features.sinks[:, None].astype(ds.dtype) - np.where(lse > -np.inf, lse, 0))
        found["dsinks"] = -np.where(lse > -np.inf, share * delta, 0).sum((0, 2))
    return found


def attention(
    arrays: dict,
    see: np.ndarray,
    scale: float,
    features: Features = NOTHING,
    *,
    low: bool = False,
) -> dict:
    """out, lse, dq, dk, dv (dbias, dsinks) of arrays query, key, value, dout, dlse.

    Gradients by hand: with delta = rowsum(dO * O) - dlse (S10) and the dropout factor F,
      dV = (F P)^T dO,  dP = F dO V^T,  dS = P * (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q,
    where dS of the product is dS of the score times the derivative of the softcap.
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
    steepness = 1.0
    if features.softcap:
        tanh = np.tanh(score / wide(features.softcap))
        score, steepness = wide(features.softcap) * tanh, 1 - tanh**2
    p, lse = _softmax(score + features.added(k.shape[2], wide), see[:, None], features.sinks)
    factor = features.factor(wide)
    p = round_(p)
    out = round_((p * factor) @ v)
    delta = (dout * out).sum(-1) - dlse
    dp = round_((dout @ transposed(v)) * factor)
    # A hidden pair has no gradient, whatever cotangent an empty row's lse gets.
    shown = see[:, None] & (lse > -np.inf)[..., None]
    ds = np.where(shown, round_(p * (dp - np.where(shown.any(-1), delta, 0)[..., None])), 0)
    learned = _feature_gradients(features, ds, lse, delta)
    ds = round_(ds * steepness)
    dq, dk = wide(scale) * (ds @ k), wide(scale) * (transposed(ds) @ q)
    if low:
        dq, dk = dq[..., ::-1], dk[..., ::-1]
    result = {
        "out": _rows(out),
        "lse": lse,
        "dq": round_(_rows(dq)),
        "dk": round_(_grouped(dk, heads)),
        "dv": round_(_grouped(transposed(p * factor) @ dout, heads)),
        **learned,
    }
    return {name: np.asarray(x, np.float64) for name, x in result.items()}


def rounding_floors(
    arrays: dict, see: np.ndarray, scale: float, features: Features = NOTHING
) -> dict:
    """How far a correct kernel may be off even where the low-precision answer is lucky.

    Sums may run in any order (one of n terms is off by about sqrt(n) roundings), scores carry
    rounding into P, dP - delta cancels, and delta is made from an out that is rounded to the test
    dtype, and summed from probabilities that may be.
    """
    dtype = arrays["query"].dtype
    step = 16 * 2.0**-52 if dtype == np.float64 else 2.0**-23
    eps = 2.0 ** -(7 if dtype.name == "bfloat16" else np.finfo(dtype).nmant)
    q, k, v, dout = (_rows(arrays[n].astype(np.float64)) for n in ("query", "key", "value", "dout"))
    heads, repeat = k.shape[1], q.shape[1] // max(k.shape[1], 1)
    k, v = (np.repeat(x, repeat, axis=1) for x in (k, v))
    transposed = lambda x: np.swapaxes(x, -1, -2)  # noqa: E731
    score, added = scale * (q @ transposed(k)), features.added(k.shape[2], np.float64)
    if features.softcap:
        score = features.softcap * np.tanh(score / features.softcap)
    p, lse = _softmax(score + added, see[:, None], features.sinks)
    factor = features.factor(np.float64)
    term = np.abs((p * factor) @ v) * np.abs(dout)  # of delta
    by_key = np.linalg.norm(p * factor * (dout @ transposed(v)), axis=-1, keepdims=True)
    q, k, v, dout = (np.abs(x) for x in (q, k, v, dout))

    score = abs(scale) * (q @ transposed(k)) + np.abs(added)  # size of its terms
    score = np.where(see[:, None] & np.isfinite(score), score, 0)
    dlse = np.abs(arrays["dlse"].astype(np.float64))[..., None]
    dp = (dout @ transposed(v)) * factor + term.sum(-1, keepdims=True) + dlse
    p_noise = step * (2 + np.sqrt(q.shape[-1]) / 4) * p * (2 + score)
    ds = p_noise * dp + 2 * step * p * dp
    ds += p * eps * (np.sqrt((term**2).sum(-1, keepdims=True)) + by_key / 2)
    floors = {
        "out": (p_noise * factor) @ v,
        "lse": 4 * step * score,
        "dq": abs(scale) * (ds @ k),
        "dk": abs(scale) * _grouped(transposed(ds) @ q, heads),
        "dv": _grouped(transposed(p_noise * factor) @ dout, heads),
    }
    if features.bias is not None:
        floors["dbias"] = reduced_to(ds, features.bias.shape, np.sum)
    if features.sinks is not None:  # relative to each row's own term
        rows = np.abs(arrays["dlse"].astype(np.float64)) + term.sum(-1)
        share = np.exp(features.sinks[:, None] - np.where(lse > -np.inf, lse, np.inf))
        noise = 2 * step * (2 + score.max(-1, initial=0)) * rows + eps * np.sqrt((term**2).sum(-1))
        floors["dsinks"] = (share * noise).sum((0, 2))
    return {name: float(x.max(initial=0)) for name, x in floors.items()}
