"""The two functions of the flash-attn-jax package, for its users."""

from jax import Array

from jax_flashattn._torch_names import as_int
from jax_flashattn.flash_attn import flash_attn_func
from jax_flashattn.flash_attn_varlen import flash_attn_varlen_func

__all__ = ["flash_mha", "flash_mha_varlen"]


def flash_mha(
    q: Array,
    k: Array,
    v: Array,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
) -> Array:
    """flash_attention with the signature of flash-attn-jax's flash_mha.

    Args:
      q: [n, l, h, d].
      k: [n, lk, hk, d]; hk divides h.
      v: as k.
      softmax_scale: factor on the scores, default 1 / sqrt(d).
      is_causal: aligned bottom-right.
      window_size: (left, right), -1 or None for unbounded.

    Returns:
      [n, l, h, d].

    Source: flash-attn-jax (nshepperd).

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import flash_mha
      >>> flash_mha(jnp.ones((2, 8, 4, 16)), *[jnp.ones((2, 8, 2, 16))] * 2, is_causal=True).shape
      (2, 8, 4, 16)
    """
    return flash_attn_func(q, k, v, 0.0, softmax_scale, is_causal, window_size)


def flash_mha_varlen(
    q: Array,
    k: Array,
    v: Array,
    seqlens_q: Array,
    seqlens_k: Array | None = None,
    *,
    max_seqlen_q: int = -1,
    max_seqlen_k: int = -1,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
) -> Array:
    """flash_attn_varlen_func with the signature of flash-attn-jax's flash_mha_varlen.

    Args:
      q: [total_q, h, d].
      k: [total_k, hk, d]; hk divides h.
      v: as k.
      seqlens_q: int32 [n + 1], cumulative lengths.
      seqlens_k: int32 [n + 1]; default seqlens_q.
      max_seqlen_q: the longest sequence, a Python int; -1 for unknown.
      max_seqlen_k: as max_seqlen_q.
      softmax_scale: factor on the scores, default 1 / sqrt(d).
      is_causal: aligned bottom-right in every sequence.
      window_size: (left, right), -1 or None for unbounded.

    Returns:
      [total_q, h, d].

    Source: flash-attn-jax (nshepperd).

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import flash_mha_varlen
      >>> x = jnp.ones((9, 4, 16))
      >>> flash_mha_varlen(x, x, x, jnp.array([0, 4, 9]), is_causal=True).shape
      (9, 4, 16)
    """
    seqlens_k = seqlens_q if seqlens_k is None else seqlens_k
    longest_q, longest_k = (
        len(x) if as_int(limit, name) == -1 else limit
        for x, limit, name in ((q, max_seqlen_q, "max_seqlen_q"), (k, max_seqlen_k, "max_seqlen_k"))
    )
    return flash_attn_varlen_func(
        *(q, k, v, seqlens_q, seqlens_k, longest_q, longest_k),
        softmax_scale=softmax_scale,
        causal=is_causal,
        window_size=window_size,
    )
