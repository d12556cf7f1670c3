"""Looking into a call: the probabilities that the kernels never write."""

from typing import Any

import jax
from jax import Array

from jax_flashattn import _validate
from jax_flashattn._reference import masked_attention, visible_keys
from jax_flashattn.masks import IntervalMask


def _probabilities(operands: _validate.Operands, spec: Any) -> Array:
    visible = visible_keys(operands, spec)[:, None]
    arrays = operands.query, operands.key, operands.value
    return masked_attention(*arrays, visible, spec.scale)[2]


_run = jax.jit(_probabilities, static_argnums=1)


def attention_probs(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    lengths: Array | tuple[Array, Array] | None = None,
    mask: IntervalMask | None = None,
) -> Array:
    """The matrix of attention probabilities of a call, for debugging and pictures.

    Costs O(sq sk) memory and time, which flash_attention exists to avoid: take a few heads of a
    short sequence. Computed by the reference, in float32, from the same checks and masks as
    flash_attention; differentiable.

    Args:
      query: as all arguments, those of flash_attention: change the function's name in the call.
      key: [b, sk, hk, d].
      value: [b, sk, hk, dv]; only its shape matters.
      causal: bottom-right aligned.
      window: (left, right).
      scale: factor on the scores, default 1/sqrt(d).
      segment_ids: int32 [b, s] or a (query, key) pair.
      lengths: int32 [b] or a (query, key) pair.
      mask: an IntervalMask [b or 1, sq].

    Returns:
      [b, hq, sq, sk] in float32 (float64 for float64 inputs). Rows sum to 1; a row that sees no
      key is 0.

    Raises:
      TypeError, ValueError: as flash_attention.

    Example:
      >>> import jax
      >>> from jax_flashattn import attention_probs
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 1, 16))
      >>> attention_probs(q, k, v, causal=True, scale=0.0)[0, 0].tolist()
      [[1.0, 0.0], [0.5, 0.5]]
    """
    operands, spec = _validate.prepare(
        query,
        key,
        value,
        causal=causal,
        window=window,
        scale=scale,
        segment_ids=segment_ids,
        lengths=lengths,
        mask=mask,
        deterministic=False,
    )
    return _run(operands, spec)
