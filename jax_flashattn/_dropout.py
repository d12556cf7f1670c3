"""Dropout from a traced key (docs/semantics.md S12): which scores stay.

Philox 4x32-10 on absolute coordinates, the mirror of csrc/semantics/philox.h: a test holds both
against each other and against the vectors of the paper (Salmon et al. 2011).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

KEEP_ALL = 65536  # keep thresholds count in 1/65536


def keep_threshold(rate: float) -> int:
    """How many of 65536 values of a score's bits keep it."""
    return round((1.0 - rate) * KEEP_ALL)


def kept_scale(threshold: int) -> float:
    """What kept probabilities are multiplied with: one over the rate applied."""
    return KEEP_ALL / threshold if threshold else 0.0


def _multiply(a: Array, b: int) -> tuple[Array, Array]:
    """High and low word of a 32 by 32 bit product, in 32-bit arithmetic."""
    mask, sixteen = jnp.uint32(0xFFFF), jnp.uint32(16)
    a_high, a_low = a >> sixteen, a & mask
    b_high, b_low = jnp.uint32(b >> 16), jnp.uint32(b & 0xFFFF)
    low = a_low * b_low
    middle = a_high * b_low + (low >> sixteen)
    middle_low = a_low * b_high + (middle & mask)
    return a_high * b_high + (middle >> sixteen) + (middle_low >> sixteen), a * jnp.uint32(b)


def philox(
    counter: tuple[Array, ...], key: tuple[Array, Array]
) -> tuple[Array, Array, Array, Array]:
    """Four uint32 words from a counter of four and a key of two, broadcast together."""
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(10):
        high0, low0 = _multiply(x0, 0xD2511F53)
        high1, low1 = _multiply(x2, 0xCD9E8D57)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = key0 + jnp.uint32(0x9E3779B9), key1 + jnp.uint32(0xBB67AE85)
    return x0, x1, x2, x3


def fold_key(words: Array) -> tuple[Array, Array]:
    """Two words from the words of any key; two are taken as they are."""
    if words.size == 2:
        return words[0], words[1]
    state = (jnp.uint32(0), jnp.uint32(0))
    padded = jnp.pad(words.ravel(), (0, -words.size % 4))
    for n in range(0, padded.size, 4):
        state = philox(tuple(padded[n : n + 4]), state)[:2]
    return state


def streams(key: tuple[Array, Array], b: int, hq: int) -> Array:
    """The operand [b, hq, 4]: key words, batch and head index. A shard keeps its global indices."""
    shape = (b, hq)
    words = [jnp.broadcast_to(word, shape) for word in key]
    indices = [jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1)]
    return jnp.stack([*words, *indices], axis=-1)


def keep_mask(streams: Array, position: Array, key_coordinate: Array, threshold: int) -> Array:
    """The boolean matrix [b, hq, sq, sk] of the scores that stay.

    Args:
      streams: uint32 [b, hq, 4].
      position: int32 [b or 1, sq], the rows' aligned key coordinates.
      key_coordinate: int32 [b or 1, sk].
      threshold: of 65536.
    """
    n = lambda value: np.uint32(value)  # noqa: E731
    i = position.astype(jnp.uint32)[:, None, :, None]
    j = key_coordinate.astype(jnp.uint32)[:, None, None, :]
    shared = n(1 << 31) + j // n(1024) * n(2)
    calls = jnp.stack([j // n(128), shared, shared + n(1)])
    key0, key1, batch, head = (streams[..., w][..., None, None] for w in range(4))
    words = philox((i, calls, batch, head), (key0, key1))
    own, *both = ([word[call] for word in words] for call in range(3))
    own = sum((jnp.where(j // n(32) % n(4) == n(w), x, n(0)) for w, x in enumerate(own)), n(0))
    both = [*both[0], *both[1]]
    bit = lambda word, on: word >> (j + n(on)) % n(32) & n(1)  # noqa: E731
    bits = [bit(own, 0)]
    bits += [bit(both[w], 0) ^ bit(own, 4 * w + 4) for w in range(7)]
    bits += [bit(word, 2) for word in both]
    number = sum((x << n(15 - w) for w, x in enumerate(bits)), jnp.uint32(0))
    return jnp.less(number, n(threshold))
