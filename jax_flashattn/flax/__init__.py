"""Attention for Flax: one function for linen and nnx."""

from jax_flashattn.flax.attention import attention_fn

__all__ = ["attention_fn"]
