"""The oracle by flash-attn's names of options."""

import numpy as np
from support import oracle


def see(sq: int, sk: int, causal=False, window_size=(-1, -1), **_) -> np.ndarray:
    """Who sees whom, from the words of flash-attn's documentation."""
    i, j = np.arange(sq)[:, None] + sk - sq, np.arange(sk)[None]
    left, right = (None if side in (-1, None) else side for side in window_size)
    visible = np.ones((sq, sk), bool)
    if causal:
        visible &= j <= i
    if left is not None:
        visible &= j >= i - left
    if right is not None:
        visible &= j <= i + right
    return visible


def oracle_features(
    sizes: tuple[int, int, int, int],
    *,
    softcap=None,
    alibi_slopes=None,
    learnable_sink=None,
    dropout_p=0.0,
    dropout_key=None,
    **_,
) -> oracle.Features:
    """The oracle's form of options by flash-attn's names, for sizes b, hq, sq, sk."""
    b, hq, sq, sk = sizes
    arrays = {"position": np.broadcast_to(np.arange(sq) + sk - sq, (b, sq))}
    if alibi_slopes is not None:
        arrays["slopes"] = np.broadcast_to(alibi_slopes, (b, hq))
    if dropout_p:
        arrays["threshold"] = round((1 - dropout_p) * 65536)
        arrays["keep"] = oracle.keep(dropout_key, arrays, (b, hq, sk))
    return oracle.Features(softcap=softcap, sinks=learnable_sink, **arrays)


def dense(q, k, v, dout, **features) -> list[np.ndarray]:
    """out, lse, dq, dk, dv of one sequence [s, h, d]: what a dense call of it has to give."""
    sizes = (1, q.shape[1], len(q), len(k))
    arrays = {n: x[None] for n, x in zip(("query", "key", "value", "dout"), (q, k, v, dout))}
    arrays["dlse"] = np.zeros(sizes[:3])
    visible = see(len(q), len(k), **features)[None]
    scale = features.get("softmax_scale", q.shape[2] ** -0.5)
    found = oracle.attention(arrays, visible, scale, oracle_features(sizes, **features))
    return [found[n][0] for n in ("out", "lse", "dq", "dk", "dv")]
