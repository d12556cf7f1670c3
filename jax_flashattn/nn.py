"""`jax.nn.dot_product_attention` without its S x S matrix."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jax_flashattn import _jax_masks, _mask
from jax_flashattn._torch_names import as_int
from jax_flashattn._validate import check_arrays, check_int32, check_lengths
from jax_flashattn.api import flash_attention
from jax_flashattn.masks import IntervalMask

__all__ = ["dot_product_attention"]


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla", "cudnn", "kernel", "reference"] | None = None,
    return_residual: bool = False,
) -> Any:
    """flash_attention with the signature and the meaning of jax.nn.dot_product_attention.

    Causal and windows are aligned top-left here, as in jax.nn; flash_attention aligns bottom-right.
    Two things differ: a row that sees no key gives 0 (in jax.nn the mean of the values), and the
    residual is float32 and has a gradient.

    Args:
      query: [b, t, n, h] or [t, n, h].
      key: [b, s, k, h] or [s, k, h]; k divides n.
      value: [b, s, k, hv] or [s, k, hv].
      bias: added to the scores, broadcastable to [b, n, t, s]. Not together with mask.
      mask: bool, broadcastable to [b, n, t, s], True where visible. If it hides keys before and
        after one run per row, the same for every head, the kernel computes it; this is checked as
        the program runs. Any other mask takes plain XLA attention with the same result. Prefer the
        arguments below: nothing of size t x s exists then.
      scale: factor on the scores, default 1/sqrt(h). A Python number.
      is_causal: row i sees keys up to i.
      query_seq_lengths: int32 [b], rows behind it give 0.
      key_value_seq_lengths: int32 [b], keys behind it are hidden.
      local_window_size: (left, right), row i sees keys i - left to i + right; an int is both.
      implementation: None or "kernel" for our kernels, "reference" for plain jax.numpy; "xla" and
        "cudnn" call jax.nn.dot_product_attention itself.
      return_residual: also return the log-sum-exp of each row's scores.

    Returns:
      [b, t, n, hv] or [t, n, hv]; with return_residual also float32 [b, t, n] or [t, n].

    Raises:
      ValueError: for a wrong shape, or a mask that is not bool.
      NotImplementedError: for mask together with bias.

    Source: jax.nn.dot_product_attention.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import dot_product_attention
      >>> q, k = jnp.ones((2, 9, 4, 16)), jnp.ones((2, 12, 2, 16))
      >>> dot_product_attention(q, k, k, is_causal=True, local_window_size=(3, 0)).shape
      (2, 9, 4, 16)
    """
    if implementation in ("xla", "cudnn"):
        native: Any = jax.nn.dot_product_attention
        return native(
            *(query, key, value, bias, mask),
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size,
            implementation=implementation,
            return_residual=return_residual,
        )
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    batched = query.ndim == 4
    query, key, value = check_arrays(*(x[None] if x.ndim == 3 else x for x in (query, key, value)))
    b, sq, sk = query.shape[0], query.shape[1], key.shape[1]
    left, right = _window(local_window_size, is_causal)
    lengths = _lengths(query_seq_lengths, key_value_seq_lengths, b, sq, sk)
    options: dict[str, Any] = {"scale": scale, "implementation": implementation}
    if mask is not None:
        if bias is not None:
            raise NotImplementedError(
                "dot_product_attention does not support mask together with bias; add the mask to "
                "the bias, or write it as is_causal, local_window_size or sequence lengths."
            )
        mask = _check_mask(mask, (b, query.shape[2], sq, sk))
        limits = _limits(left, right, lengths, sq, sk)
        out, lse = _jax_masks.attend(query, key, value, mask, limits, **options)
    else:
        if sq == sk and lengths is None:  # then top-left is bottom-right
            options["window"] = (left, right)
        elif left is None and right is None:
            options["lengths"] = lengths
        else:
            options["mask"] = _limits(left, right, lengths, sq, sk)
        bias = None if bias is None else _as_4d(bias)
        out, lse = flash_attention(query, key, value, bias=bias, return_lse=True, **options)
    out, lse = (out, lse.swapaxes(1, 2)) if batched else (out[0], lse[0].T)
    return (out, lse) if return_residual else out


def _window(size: Any, is_causal: bool) -> tuple[int | None, int | None]:
    """(left, right) of both arguments, None for unbounded."""
    left = right = None
    if size is not None:
        pair = size if isinstance(size, (tuple, list)) else (size, size)
        if len(pair) != 2:
            raise ValueError(f"local_window_size must be an int or (left, right), got {size!r}.")
        left, right = (as_int(side, "local_window_size") for side in pair)
        if min(left, right) < 0:
            raise ValueError(f"local_window_size must be 0 or more, got {size!r}.")
    if is_causal:
        right = 0
    return left, right


def _lengths(query_lengths: Any, key_lengths: Any, b: int, sq: int, sk: int):
    """A (query, key) pair of int32 [b], or None if neither is given."""
    if query_lengths is None and key_lengths is None:
        return None
    given = ("query_seq_lengths", query_lengths, sq), ("key_value_seq_lengths", key_lengths, sk)
    return tuple(
        jnp.full(b, full, jnp.int32) if x is None else check_int32(x, name, (b,))
        for name, x, full in given
    )


def _limits(left, right, lengths, sq: int, sk: int) -> IntervalMask | None:
    """Window and lengths as one mask."""
    if left is None and right is None and lengths is None:
        return None
    limits = _jax_masks.top_left(sq, sk, left, right)
    if lengths is None:
        return limits
    pairs = check_lengths(lengths, lengths[0].shape[0])
    return limits & IntervalMask(*_mask.arithmetic_intervals(sq, sk, None, None, pairs))


def _as_4d(x: Any) -> Array:
    x = jnp.asarray(x)
    return x.reshape(*(1,) * (4 - x.ndim), *x.shape)


def _check_mask(mask: Any, shape: tuple[int, int, int, int]) -> Array:
    """As bool [b or 1, n or 1, t or 1, s or 1]."""
    mask = _as_4d(mask)
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask must be bool, got {mask.dtype}; an additive mask is a bias.")
    if mask.ndim != 4 or any(n not in (1, full) for n, full in zip(mask.shape, shape)):
        raise ValueError(f"mask must be broadcastable to {shape}, got {mask.shape}.")
    return mask
