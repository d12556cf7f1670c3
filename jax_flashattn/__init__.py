"""FlashAttention for JAX: one differentiable, packed, windowed, grouped-query attention call."""

from jax_flashattn import _batching as _batching  # registers the rules
from jax_flashattn import _lowering as _lowering
from jax_flashattn.api import flash_attention
from jax_flashattn.blockwise import blockwise_attention
from jax_flashattn.explanation import explain
from jax_flashattn.inspection import attention_probs
from jax_flashattn.masks import IntervalMask
from jax_flashattn.partials import attention_delta, merge_partials
from jax_flashattn.passes import attention_backward, attention_forward

__version__ = "0.1.0"
__all__ = [
    "IntervalMask",
    "attention_backward",
    "attention_delta",
    "attention_forward",
    "attention_probs",
    "blockwise_attention",
    "explain",
    "flash_attention",
    "merge_partials",
]
