"""The JAX-native entry point."""

from typing import Any, Literal

import jax
from jax import Array

from jax_flashattn import _validate
from jax_flashattn._attention import attention, forward_attention
from jax_flashattn._reference import reference_attention
from jax_flashattn.masks import IntervalMask

# Jitted so that an eager call is one compiled program; within a jit they are inlined.
_kernels = {
    "reverse": jax.jit(attention, static_argnums=1),
    "forward": jax.jit(forward_attention, static_argnums=1),
}
_reference = jax.jit(reference_attention, static_argnums=1)


def flash_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    lengths: Array | tuple[Array, Array] | None = None,
    mask: IntervalMask | None = None,
    bias: Array | None = None,
    sinks: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    deterministic: bool = False,
    return_lse: bool = False,
    differentiation: Literal["reverse", "forward"] = "reverse",
    implementation: Literal["kernel", "reference"] | None = None,
) -> Any:  # Array, or (Array, Array) with return_lse
    """Exact attention, softmax(scale * Q K^T) V, in O(S) memory.

    Everything that hides keys may be combined; a row that sees no key gives 0. The meaning of each
    argument is fixed by docs/semantics.md, on every backend.

    Args:
      query: [b, sq, hq, d], bfloat16 or float16, on CPU also float32 or float64.
      key: [b, sk, hk, d], same dtype; hk divides hq, head h of the query uses key head
        h // (hq // hk) (GQA, MQA).
      value: [b, sk, hk, dv], same dtype; d and dv are 1 to 256.
      causal: row i sees keys up to i + sk - sq: the last query sees the last key (bottom-right).
      window: (left, right): row i sees keys i + sk - sq - left to i + sk - sq + right. None is
        unbounded, 0 a real bound. With causal, right is at most 0.
      scale: factor on the scores, default 1/sqrt(d). A Python number.
      softcap: scores become softcap * tanh(scores / softcap); None or 0 is off. A Python number.
      alibi_slopes: float32 [hq] or [b, hq]: subtracts slope * |i + sk - sq - j| from the scores,
        within its segment for a packed row. Slopes are constants: their gradient is zero.
      segment_ids: int32 [b, s], packed documents: rows and keys of one maximal run of equal ids
        see each other, with causal and window applied within the run; id 0 is padding. Or a
        (query [b, sq], key [b, sk]) pair, in which the n-th run of an id meets the n-th.
      lengths: int32 [b], how many leading rows and keys are real; or a (query, key) pair.
      mask: an IntervalMask [b or 1, sq] to intersect with the above.
      bias: [b or 1, hq or 1, sq or 1, sk or 1], dtype of query or float32: added to the scores
        behind softcap. It has a gradient, of its own shape. Only on CPU yet.
      sinks: float32 [hq], a logit per head that joins the softmax denominator only; it has a
        gradient. A row that sees no key stays 0.
      dropout_rate: probability of dropping a probability, rounded to 1/65536; the rest is divided
        by the rate kept. A Python number.
      dropout_key: one jax.random key, new-style or raw, traced or not; required when
        dropout_rate > 0. The same key drops the same positions on every backend.
      deterministic: ask for a bitwise repeatable backward. The forward always is, and on CPU so is
        the backward.
      return_lse: also return the log-sum-exp of each row's scores.
      differentiation: "reverse" for jax.grad; "forward" for jax.jvp, linearize and jacfwd, and for
        grad too, also of losses that hold a jvp under stop_gradient (docs/transformations.md).
        Second derivatives (Hessian-vector products) need implementation="reference".
      implementation: "kernel" (the default), or "reference": plain jax.numpy in O(sq sk) memory.

    Returns:
      [b, sq, hq, dv] in the dtype of query; with return_lse also float32 (float64 for float64
      inputs) [b, hq, sq], -inf for rows that see nothing, differentiable.

    Raises:
      TypeError: for a wrong dtype or type.
      ValueError: for a wrong shape or value.
      NotImplementedError: for a combination no kernel supports.

    Source: Dao et al. 2022 (FlashAttention), Dao 2023 (FlashAttention-2).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_flashattn import flash_attention
      >>> q = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
      >>> k = v = jax.random.normal(jax.random.key(1), (2, 128, 2, 64))
      >>> flash_attention(q, k, v, causal=True, window=(31, 0)).shape
      (2, 128, 8, 64)
    """
    _validate.check_implementation(implementation)
    _validate.check_differentiation(differentiation)
    operands, spec = _validate.prepare(
        query,
        key,
        value,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        segment_ids=segment_ids,
        lengths=lengths,
        mask=mask,
        bias=bias,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        deterministic=deterministic,
    )
    run = _reference if implementation == "reference" else _kernels[differentiation]
    out, lse = run(operands, spec)
    return (out, lse) if return_lse else out
