"""Paged keys and values: [num_blocks, block_size, heads, head_dim] and a table of blocks."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_flashattn._validate import check_int32

BLOCK_SIZE_UNIT = 16


def check_block_table(block_table, blocks: Array, b: int, *, name: str) -> Array:
    """int32 [b, blocks of a sequence] for blocks of a supported size."""
    shape = np.shape(block_table)
    if len(shape) != 2 or shape[0] != b or shape[1] == 0:
        raise ValueError(
            f"block_table must have shape [{b}, blocks per sequence], with one block at least, got "
            f"{shape}."
        )
    size = blocks.shape[1]
    if size == 0 or size % BLOCK_SIZE_UNIT:
        raise ValueError(
            f"{name} must be [num_blocks, block_size, heads, head_dim] with a block_size that is a "
            f"multiple of {BLOCK_SIZE_UNIT}, got shape {tuple(blocks.shape)}."
        )
    return check_int32(block_table, "block_table", shape)


def check_block_ids(table: np.ndarray, lengths: np.ndarray, blocks: Array) -> None:
    """The entries that sequences of these lengths use name blocks; others may hold anything."""
    num_blocks, size = blocks.shape[:2]
    capacity = table.shape[1] * size
    if lengths.size and lengths.max() > capacity:
        raise ValueError(
            f"block_table has room for {capacity} keys per sequence, {lengths.max()} are needed."
        )
    used = np.arange(table.shape[1])[None] * size < lengths[:, None]
    bad = table[used & ((table < 0) | (table >= num_blocks))]
    if bad.size:
        raise ValueError(f"block_table must hold ids 0 to {num_blocks - 1}, got {bad[0]}.")


def gather(blocks: Array, table: Array) -> Array:
    """The keys of each sequence one after the other: [b, blocks per sequence * block_size, h, d].

    A copy of everything the table names. Ids out of range are clamped.
    """
    b, count = table.shape
    rows = take(blocks, table)
    return rows.reshape(b, count * blocks.shape[1], *blocks.shape[2:])


def take(x: Array, indices: Array) -> Array:
    """x[indices], with indices clamped."""
    return x.at[jnp.clip(indices, 0)].get(mode="clip")
