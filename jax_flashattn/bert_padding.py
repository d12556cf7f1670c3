"""flash-attn's padding helpers, by name and order of results, with static shapes.

Torch keeps exactly the real tokens. Here there is room for `max_tokens`, by default every token of
the batch; what is not needed is padding behind the last sequence (zeros, index batch * seqlen),
which the varlen functions leave alone and pad_input drops. Everything is differentiable and may be
traced.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_flashattn import _values, packing

__all__ = ["index_first_axis", "pad_input", "unpad_input", "unpad_input_for_concatenated_sequences"]


def index_first_axis(input: Array, indices: Array) -> Array:
    """input[indices]; an index behind the end gives 0.

    Args:
      input: [n, ...].
      indices: int32 [m], 0 to n.

    Returns:
      [m, ...].

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn.bert_padding import index_first_axis
      >>> index_first_axis(jnp.array([[1, 2], [3, 4]]), jnp.array([1, 2])).tolist()
      [[3, 4], [0, 0]]
    """
    input, rows = jnp.asarray(input), jnp.asarray(indices)
    _values.check_range(indices, 0, input.shape[0], "indices")
    return input.at[rows].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def unpad_input(
    hidden_states: Array,
    attention_mask: Array,
    unused_mask: Array | None = None,
    *,
    max_tokens: int | None = None,
) -> tuple[Array, Array, Array, int, Array]:
    """Real tokens of a padded batch one after the other, for the varlen functions.

    Args:
      hidden_states: [batch, seqlen, ...].
      attention_mask: bool or int [batch, seqlen], nonzero for real tokens, wherever they are.
      unused_mask: bool or int [batch, seqlen], nonzero for tokens that get room but do not count.
      max_tokens: static number of tokens of the result; default batch * seqlen.

    Returns:
      hidden_states [max_tokens, ...], indices int32 [max_tokens] into the flattened batch,
      cu_seqlens int32 [batch + 1], the longest sequence (a Python int; seqlen if the mask is
      traced), and int32 [batch], how many tokens of each sequence count (`seqused`).

    Raises:
      ValueError: for a wrong shape; for more than max_tokens tokens if the mask is not traced
        (else the last ones are dropped).

    Source: flash-attn 2.8, bert_padding.py.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn.bert_padding import unpad_input
      >>> mask = jnp.array([[1, 1, 0], [1, 0, 0]])
      >>> x, indices, cu_seqlens, max_seqlen, seqused = unpad_input(jnp.ones((2, 3, 8)), mask)
      >>> indices.tolist(), cu_seqlens.tolist(), max_seqlen, seqused.tolist()
      ([0, 1, 3, 6, 6, 6], [0, 2, 3], 2, [2, 1])
    """
    hidden_states = jnp.asarray(hidden_states)
    counted = _check_mask(attention_mask, hidden_states, "attention_mask")
    real = counted
    if unused_mask is not None:
        real = real | _check_mask(unused_mask, hidden_states, "unused_mask")
    lengths = real.sum(-1, dtype=jnp.int32)
    x, indices, cu_seqlens = _unpad(hidden_states, real, lengths, max_tokens)
    longest = _longest(real.shape[1], lengths if _values.known(lengths) else None)
    return x, indices, cu_seqlens, longest, jnp.asarray(counted.sum(-1, dtype=jnp.int32))


def unpad_input_for_concatenated_sequences(
    hidden_states: Array,
    attention_mask_in_length: Array,
    *,
    max_tokens: int | None = None,
    max_sequences: int | None = None,
) -> tuple[Array, Array, Array, int]:
    """unpad_input of rows that hold several short sequences each.

    Args:
      hidden_states: [batch, seqlen, ...].
      attention_mask_in_length: int32 [batch, seqlen]: nonzero entries are the lengths of the
        sequences of a row, such as [2, 3, 0, 0, 0, 0].
      max_tokens: static number of tokens of the result; default batch * seqlen.
      max_sequences: static number of sequences; default batch * seqlen. Those not needed are empty.

    Returns:
      hidden_states [max_tokens, ...], indices int32 [max_tokens] into the flattened batch,
      cu_seqlens int32 [max_sequences + 1], and the longest sequence (a Python int; seqlen if the
      lengths are traced).

    Raises:
      ValueError: if the lengths are not traced, for a negative one, a row of more than seqlen
        tokens, more than max_tokens tokens or max_sequences sequences.

    Source: flash-attn 2.8, bert_padding.py.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn import bert_padding
      >>> lengths = jnp.array([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
      >>> x, indices, cu_seqlens, max_seqlen = bert_padding.unpad_input_for_concatenated_sequences(
      ...     jnp.ones((3, 6, 8)), lengths, max_tokens=16, max_sequences=5)
      >>> cu_seqlens.tolist(), max_seqlen
      ([0, 2, 5, 8, 10, 16], 6)
    """
    hidden_states = jnp.asarray(hidden_states)
    given = attention_mask_in_length
    lengths = packing.check_attention_mask_in_length(given)
    _check_mask(lengths, hidden_states, "attention_mask_in_length")
    flat = lengths.ravel()
    room = flat.size if max_sequences is None else max_sequences

    def check_count(values):
        count = np.count_nonzero(values)
        if count > room:
            raise ValueError(
                f"attention_mask_in_length has {count} sequences, max_sequences is {room}."
            )

    _values.check(check_count, given)
    (where,) = jnp.nonzero(flat, size=room, fill_value=flat.size)
    each = flat.at[where].get(mode="fill", fill_value=0)
    real = jnp.arange(lengths.shape[1]) < lengths.sum(1, keepdims=True)
    x, indices, cu_seqlens = _unpad(hidden_states, real, each, max_tokens)
    longest = _longest(lengths.shape[1], np.asarray(given) if _values.known(given) else None)
    return x, indices, cu_seqlens, longest


def pad_input(hidden_states: Array, indices: Array, batch: int, seqlen: int) -> Array:
    """The padded batch back from its real tokens; the rest is 0.

    Args:
      hidden_states: [max_tokens, ...].
      indices: int32 [max_tokens], from unpad_input.
      batch: static size of the batch.
      seqlen: static length of its rows.

    Returns:
      [batch, seqlen, ...].

    Source: flash-attn 2.8, bert_padding.py.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_flashattn.bert_padding import pad_input
      >>> pad_input(jnp.array([[5], [6], [0]]), jnp.array([0, 2, 4]), 2, 2)[..., 0].tolist()
      [[5, 0], [6, 0]]
    """
    hidden_states, rows = jnp.asarray(hidden_states), jnp.asarray(indices)
    total = batch * seqlen
    _values.check_range(indices, 0, total, "indices")
    zeros = jnp.zeros((total, *hidden_states.shape[1:]), hidden_states.dtype)
    padded = zeros.at[rows].set(hidden_states, mode="drop", wrap_negative_indices=False)
    return padded.reshape(batch, seqlen, *hidden_states.shape[1:])


def _check_mask(mask, hidden_states: Array, name: str) -> Array | np.ndarray:
    """As bool [batch, seqlen]."""
    # A known mask stays a numpy array, so that its values are known under jit as well.
    mask = np.asarray(mask) if _values.known(mask) else jnp.asarray(mask)
    if hidden_states.ndim < 2 or mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name} must have the first two dimensions of hidden_states "
            f"{hidden_states.shape}, got {mask.shape}."
        )
    return mask != 0


def _longest(seqlen: int, lengths: Array | np.ndarray | None) -> int:
    """Of known lengths their maximum; else what they cannot exceed."""
    return seqlen if lengths is None else int(np.max(np.asarray(lengths), initial=0))


def _unpad(hidden_states: Array, real, lengths, max_tokens: int | None):
    """Real tokens [max_tokens, ...], their indices, and cu_seqlens of the given lengths."""
    total = real.size
    room = total if max_tokens is None else max_tokens

    def check_room(real):
        count = np.count_nonzero(real)
        if count > room:
            raise ValueError(f"the batch has {count} tokens, max_tokens is {room}.")

    _values.check(check_room, real)
    (indices,) = jnp.nonzero(real.ravel(), size=room, fill_value=total)
    flat = hidden_states.reshape(total, *hidden_states.shape[2:])
    ends = jnp.minimum(jnp.cumsum(lengths, dtype=jnp.int32), room)
    cu_seqlens = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    indices = indices.astype(jnp.int32)
    return index_first_axis(flat, indices), indices, cu_seqlens
