"""FlashAttention for JAX: one differentiable, packed, windowed, grouped-query attention call."""

from jax_flashattn import _batching as _batching  # registers the rules
from jax_flashattn import _lowering as _lowering
from jax_flashattn import bert_padding as bert_padding
from jax_flashattn import packing as packing
from jax_flashattn.api import flash_attention
from jax_flashattn.blockwise import blockwise_attention
from jax_flashattn.explanation import explain
from jax_flashattn.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from jax_flashattn.flash_attn_varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from jax_flashattn.flash_mha import flash_mha, flash_mha_varlen
from jax_flashattn.inspection import attention_probs
from jax_flashattn.kvcache import flash_attn_with_kvcache
from jax_flashattn.masks import IntervalMask
from jax_flashattn.nn import dot_product_attention
from jax_flashattn.partials import attention_delta, attention_sink_gradient, merge_partials
from jax_flashattn.passes import attention_backward, attention_forward
from jax_flashattn.rotary import apply_rotary_emb
from jax_flashattn.shifted_sparse import shifted_sparse_attention

__version__ = "0.1.0"
__all__ = [
    "IntervalMask",
    "apply_rotary_emb",
    "attention_backward",
    "attention_delta",
    "attention_forward",
    "attention_probs",
    "attention_sink_gradient",
    "bert_padding",
    "blockwise_attention",
    "dot_product_attention",
    "explain",
    "flash_attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flash_mha",
    "flash_mha_varlen",
    "merge_partials",
    "packing",
    "shifted_sparse_attention",
]
