"""Calls each instance of the Hopper kernels once, on the smallest shapes that fill several tiles.

A program of its own, for compute-sanitizer: python tests/gpu/every_instance.py [head dim ...]
"""

import itertools
import sys

import jax
import jax.numpy as jnp

from jax_flashattn import flash_attention

HEAD_DIMS = (64, 96, 128, 192, 256)
OPTIONS = (
    {"causal": True},
    {"alibi": True},
    {"softcap": 5.0, "alibi": True},
    {"softcap": 5.0},
    {"dropout_rate": 0.2, "alibi": True, "causal": True},
    {"dropout_rate": 0.2},
    {"segment_ids": True, "window": (70, 0)},
)


def call(d: int, dtype: str, options: dict, deterministic: bool) -> None:
    """Output, lse and gradients, of 300 rows and 300 keys of 4 heads on 2."""
    b, s, hq, hk = 2, 300, 4, 2
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (b, s, hq, d), (b, s, hk, d), (b, s, hk, d)
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]
    traced = {}
    if options.get("alibi"):
        traced["alibi_slopes"] = jnp.full(hq, 0.1)
    if options.get("segment_ids"):
        traced["segment_ids"] = jnp.tile(jnp.arange(s) // 77, (b, 1))
    if options.get("dropout_rate"):
        traced["dropout_key"] = jax.random.key(1)
    static = {k: v for k, v in options.items() if k not in ("alibi", "segment_ids")}

    def total(q, k, v):
        out, lse = flash_attention(
            q, k, v, return_lse=True, deterministic=deterministic, **static, **traced
        )
        return out.astype(jnp.float32).sum() + lse.sum()

    jax.block_until_ready(jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*arrays))


def main(head_dims: list[int]) -> None:
    """Of these head dims."""
    count = 0
    for d, dtype, options in itertools.product(head_dims, ("bfloat16", "float16"), OPTIONS):
        call(d, dtype, options, deterministic=count % 2 == 0)
        count += 1
    print(f"{count} instances on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main([int(d) for d in sys.argv[1:]] or list(HEAD_DIMS))
