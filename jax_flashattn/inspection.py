"""Looking into a call: the probabilities that the kernels never write."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jax_flashattn import _validate
from jax_flashattn._operands import Operands
from jax_flashattn._reference import call_extras, masked_attention, visible_keys
from jax_flashattn._spec import AttentionSpec
from jax_flashattn.masks import IntervalMask


def _probabilities(operands: Operands, spec: AttentionSpec) -> tuple[Array, Array]:
    visible, extras = visible_keys(operands, spec)[:, None], call_extras(operands, spec)
    arrays = operands.query, operands.key, operands.value
    probabilities = masked_attention(*arrays, visible, spec.scale, extras)[2]
    keep = jnp.ones((), bool) if extras.keep is None else extras.keep
    return probabilities, jnp.broadcast_to(keep, probabilities.shape)


_run = jax.jit(_probabilities, static_argnums=1)


def attention_probs(
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
    implementation: Literal["kernel", "reference"] | None = None,
    return_dropout_mask: bool = False,
) -> Any:  # Array, or (Array, Array) with return_dropout_mask
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
      softcap: scores become softcap * tanh(scores / softcap).
      alibi_slopes: float32 [hq] or [b, hq].
      segment_ids: int32 [b, s] or a (query, key) pair.
      lengths: int32 [b] or a (query, key) pair.
      mask: an IntervalMask [b or 1, sq].
      bias: [b or 1, hq or 1, sq or 1, sk or 1].
      sinks: float32 [hq].
      dropout_rate: of the dropout mask; the probabilities returned are those before it.
      dropout_key: one jax.random key.
      deterministic: taken like implementation, so that calls can be copied: this is the reference,
        and always repeatable.
      implementation: see deterministic.
      return_dropout_mask: also return which probabilities dropout keeps.

    Returns:
      [b, hq, sq, sk] in float32 (float64 for float64 inputs). Rows sum to 1, with sinks to less; a
      row that sees no key is 0. With return_dropout_mask also bool [b, hq, sq, sk], the scores
      that the kernels keep for this key (S12), True where there is no dropout; the output is
      where(keep, probs, 0) @ value over the rate kept.

    Raises:
      TypeError, ValueError: as flash_attention.

    Example:
      >>> import jax
      >>> from jax_flashattn import attention_probs
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 1, 16))
      >>> attention_probs(q, k, v, causal=True, scale=0.0)[0, 0].tolist()
      [[1.0, 0.0], [0.5, 0.5]]
    """
    _validate.check_implementation(implementation)
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
    probabilities, keep = _run(operands, spec)
    return (probabilities, keep) if return_dropout_mask else probabilities
