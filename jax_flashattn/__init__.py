"""FlashAttention for JAX: one differentiable, packed, windowed, grouped-query attention call."""

from jax_flashattn import _batching as _batching  # registers the rules
from jax_flashattn import _lowering as _lowering
from jax_flashattn.api import flash_attention
from jax_flashattn.masks import IntervalMask

__version__ = "0.1.0"
__all__ = ["IntervalMask", "flash_attention"]
