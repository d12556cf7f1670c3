"""flash-attn's functions under their own names: torch's argument order and defaults.

What only JAX needs is keyword-only behind the torch arguments. docs/porting.md has a table of
every difference. The dense functions are here, the varlen ones in flash_attn_varlen.py.
"""

from typing import Any

from jax import Array

from jax_flashattn import _torch_names
from jax_flashattn._validate import check_arrays
from jax_flashattn.api import flash_attention

__all__ = ["flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"]


def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    dropout_key: Any = None,
    learnable_sink: Array | None = None,
    implementation: str | None = None,
) -> Any:
    """flash_attention with the arguments of flash-attn's function of this name.

    Args:
      q: [batch, seqlen_q, heads, head_dim].
      k: [batch, seqlen_k, heads_k, head_dim]; heads_k divides heads (GQA, MQA).
      v: as k.
      dropout_p: probability of dropping an attention weight; needs dropout_key.
      softmax_scale: factor on the scores, default 1 / sqrt(head_dim).
      causal: aligned bottom-right: the last query sees the last key.
      window_size: (left, right): query i sees keys i + seqlen_k - seqlen_q - left to
        i + seqlen_k - seqlen_q + right; -1 or None is unbounded.
      softcap: scores become softcap * tanh(score / softcap); 0 is off.
      alibi_slopes: float32 [heads] or [batch, heads]: adds
        -slope * |i + seqlen_k - seqlen_q - j| to the score of query i and key j.
      deterministic: a bitwise repeatable backward.
      return_attn_probs: also return softmax_lse and S_dmask; for tests.
      dropout_key: a jax.random key, required when dropout_p > 0.
      learnable_sink: [heads], a logit per head that joins the softmax's denominator.
      implementation: see flash_attention.

    Returns:
      out [batch, seqlen_q, heads, head_dim]; with return_attn_probs (out, softmax_lse, S_dmask):
      softmax_lse float32 [batch, heads, seqlen_q], and S_dmask [batch, heads, seqlen_q, seqlen_k],
      the probabilities before dropout with a negative sign where dropped, None without dropout.

    Raises:
      ValueError: for bad values, also when S_dmask would take more than 1 GB.
      TypeError: for a wrong dtype or type.
      NotImplementedError: for what flash_attention does not support yet.

    Source: flash-attn 2.8, flash_attn_interface.py.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import flash_attn_func
      >>> q, k = jnp.ones((2, 5, 4, 16)), jnp.ones((2, 9, 2, 16))
      >>> flash_attn_func(q, k, k, 0.0, None, True, (4, -1)).shape
      (2, 5, 4, 16)
    """
    options = _torch_names.native_options(
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        dropout_key=dropout_key,
        learnable_sink=learnable_sink,
        implementation=implementation,
    )
    if not return_attn_probs:
        return flash_attention(q, k, v, **options)
    q, k, v = check_arrays(q, k, v)
    probabilities = _torch_names.signed_probabilities(q, k, options) if dropout_p else None
    return *flash_attention(q, k, v, return_lse=True, **options), probabilities


def flash_attn_kvpacked_func(
    q: Array,
    kv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    dropout_key: Any = None,
    learnable_sink: Array | None = None,
    implementation: str | None = None,
) -> Any:
    """flash_attn_func of keys and values in one array, whose gradient is one array.

    Args:
      q: [batch, seqlen_q, heads, head_dim].
      kv: [batch, seqlen_k, 2, heads_k, head_dim].
      The other arguments are those of flash_attn_func.

    Returns:
      as flash_attn_func.

    Raises:
      ValueError: for a wrong middle axis, and as flash_attn_func.

    Source: flash-attn 2.8, flash_attn_interface.py.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import flash_attn_kvpacked_func
      >>> flash_attn_kvpacked_func(jnp.ones((2, 5, 4, 16)), jnp.ones((2, 9, 2, 2, 16))).shape
      (2, 5, 4, 16)
    """
    k, v = _torch_names.unpack(kv, 2, 5, "kv")
    return flash_attn_func(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        *(deterministic, return_attn_probs),
        dropout_key=dropout_key,
        learnable_sink=learnable_sink,
        implementation=implementation,
    )


def flash_attn_qkvpacked_func(
    qkv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    dropout_key: Any = None,
    learnable_sink: Array | None = None,
    implementation: str | None = None,
) -> Any:
    """flash_attn_func of queries, keys and values in one array, whose gradient is one array.

    Args:
      qkv: [batch, seqlen, 3, heads, head_dim].
      The other arguments are those of flash_attn_func.

    Returns:
      as flash_attn_func.

    Raises:
      ValueError: for a wrong middle axis, and as flash_attn_func.

    Source: flash-attn 2.8, flash_attn_interface.py.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import flash_attn_qkvpacked_func
      >>> flash_attn_qkvpacked_func(jnp.ones((2, 9, 3, 4, 16)), causal=True).shape
      (2, 9, 4, 16)
    """
    q, k, v = _torch_names.unpack(qkv, 3, 5, "qkv")
    return flash_attn_func(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        *(deterministic, return_attn_probs),
        dropout_key=dropout_key,
        learnable_sink=learnable_sink,
        implementation=implementation,
    )
