"""Ring attention from the library's public pieces: one sequence over several devices.

    python examples/context_parallel.py                     # 8 virtual CPU devices
    python examples/context_parallel.py --layout striped --window 300
    python examples/context_parallel.py --alibi --dropout_rate 0.1
    python examples/context_parallel.py --devices 0         # all devices there are

Every device keeps its rows; keys and values travel around the ring, and in the backward their
gradients travel with them. A small layer is trained twice on packed documents, on the ring and on
one device, and the two are compared. (Virtual devices share the machine's cores: the times printed
show what the ring costs, not what it gains.)
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashattn import (
    IntervalMask,
    attention_backward,
    attention_delta,
    attention_forward,
    flash_attention,
    merge_partials,
)

LAYOUTS = ("contiguous", "zigzag", "striped")


# --- The ring ---


def token_order(layout: str, s: int, n: int) -> np.ndarray:
    """Which tokens lie where: device r of n holds order[r * s // n : (r + 1) * s // n].

    Under a causal mask the last tokens see the most keys. zigzag gives device r the chunks r and
    2 n - 1 - r, striped every n-th token, so that all devices have the same to do.
    """
    if s % (2 * n):
        raise ValueError(f"{s} tokens cannot be cut into {2 * n} equal chunks")
    at = np.arange(s, dtype=np.int32)
    if layout == "striped":
        return at.reshape(-1, n).T.ravel()
    if layout == "zigzag":
        chunks = at.reshape(2 * n, -1)
        return np.stack([chunks[:n], chunks[: n - 1 : -1]], axis=1).ravel()
    return at


def _next_device(tree, axis_name: str):
    """Everything one device further along the ring."""
    n = jax.lax.axis_size(axis_name)
    ring = [(r, (r + 1) % n) for r in range(n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, ring), tree)


class Ring(NamedTuple):
    """What is static about a ring.

    axis_name: the mesh axis that it is.
    stretches: in how many equal stretches of tokens with one distance a shard lies; of a
      token_order 2 for zigzag, 1 otherwise. Only ALiBi and dropout ask.
    dropout_rate: as in flash_attention.
    """

    axis_name: str
    stretches: int = 1
    dropout_rate: float = 0.0


def _parts(held, options: dict, mask: IntervalMask, ring: Ring):
    """((key, value), options of a pass) of each stretch of the keys that a device holds."""
    count = ring.stretches if options else 1
    for key, value, at in zip(*(jnp.split(x, count, min(x.ndim, 2) - 1) for x in held)):
        given = options | {"mask": mask.for_positions(at)}
        if options:
            stride = (at[-1] - at[0]) // max(at.size - 1, 1)
            given["key_coordinates"] = (at[0], jnp.maximum(stride, 1))
        yield (key, value), given


def _options(query, positions, slopes, dropout_key, ring: Ring) -> dict:
    """The features of the whole, as arguments of both passes."""
    if slopes is None and dropout_key is None:
        return {}
    return {
        "alibi_slopes": slopes,
        "dropout_rate": ring.dropout_rate,
        "dropout_key": dropout_key,
        "query_positions": jnp.broadcast_to(positions, query.shape[:2]),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def ring_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: IntervalMask,
    positions: Array,
    slopes: Array | None,
    dropout_key: Array | None,
    ring: Ring,
) -> tuple[Array, Array]:
    """Attention of this device's rows to the keys of all devices, inside shard_map.

    Args:
      query: [b, s, hq, d], this device's rows, as all arrays here.
      key: [b, s, hk, d].
      value: [b, s, hk, dv].
      mask: [b or 1, s], which keys of the whole sequence these rows see.
      positions: int32 [s], increasing: where these tokens lie in the whole sequence.
      slopes: float32 [hq] of ALiBi, or None.
      dropout_key: the words of a jax.random key, the same on all devices, or None.
      ring: what is static.

    Returns:
      (out, lse) of these rows over all keys.
    """
    return _ring_forward(query, key, value, mask, positions, slopes, dropout_key, ring)[0]


def _ring_forward(query, key, value, mask, positions, slopes, dropout_key, ring):
    options = _options(query, positions, slopes, dropout_key, ring)

    def attend(held):
        return [attention_forward(query, *kv, **o) for kv, o in _parts(held, options, mask, ring)]

    def step(state, _):
        held, *total = state
        held = _next_device(held, ring.axis_name)
        return (held, *merge_partials(*zip(total, *attend(held)))), None

    held = (key, value, positions)
    first = merge_partials(*zip(*attend(held)))
    hops = jax.lax.axis_size(ring.axis_name) - 1
    (_, out, lse), _ = jax.lax.scan(step, (held, *first), length=hops)
    out = out.astype(query.dtype)
    return (out, lse), (query, key, value, mask, positions, slopes, dropout_key, out, lse)


def _ring_backward(ring, residuals, cotangents):
    query, key, value, mask, positions, slopes, dropout_key, out, lse = residuals
    dout, dlse = cotangents
    delta = attention_delta(dout, out, dlse)  # of the whole rows, once
    options = _options(query, positions, slopes, dropout_key, ring)

    def gradients(held):
        dq, dk, dv = zip(
            *(
                attention_backward(query, *kv, dout, lse, delta, **o)
                for kv, o in _parts(held, options, mask, ring)
            )
        )
        dq = functools.reduce(jnp.add, [x.astype(delta.dtype) for x in dq])
        return dq, *(jnp.concatenate(x, 1).astype(delta.dtype) for x in (dk, dv))

    def step(state, _):
        dq, travelling = state
        held, dk, dv = _next_device(travelling, ring.axis_name)
        more = gradients(held)
        return (dq + more[0], (held, dk + more[1], dv + more[2])), None

    held = (key, value, positions)
    dq, dk, dv = gradients(held)
    hops = jax.lax.axis_size(ring.axis_name) - 1
    (dq, (_, dk, dv)), _ = jax.lax.scan(step, (dq, (held, dk, dv)), length=hops)
    dk, dv = _next_device((dk, dv), ring.axis_name)  # home
    given = dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype)
    return *given, None, None, None, None


ring_attention.defvjp(_ring_forward, _ring_backward)


def sharded_attention(
    mesh: Mesh, layout: str = "contiguous", dropout_rate: float = 0.0
) -> Callable:
    """ring_attention of whole arrays, whose tokens lie in a token_order over the mesh's axis.

    The layout matters only to ALiBi and dropout. Further arguments: slopes and dropout_key.
    """
    (axis,) = mesh.axis_names
    tokens, lse = P(None, axis), P(None, None, axis)
    ring = Ring(axis, 2 if layout == "zigzag" else 1, dropout_rate)

    def run(query, key, value, mask, positions, slopes=None, dropout_key=None):
        return jax.shard_map(
            functools.partial(ring_attention, ring=ring),
            mesh=mesh,
            in_specs=(tokens, tokens, tokens, tokens, P(axis), P(), P()),
            out_specs=(tokens, lse),
        )(query, key, value, mask, positions, slopes, dropout_key)

    return run


# --- Something to train ---


def packed_ids(s: int, rng: np.random.Generator) -> np.ndarray:
    """Segment ids int32 [1, s] of documents of random lengths, with padding behind them."""
    cuts = np.sort(rng.choice(np.arange(1, s), 5, replace=False))
    ids = np.searchsorted(cuts, np.arange(s), side="right") + 1
    return np.where(ids <= 5, ids, 0)[None].astype(np.int32)


def init_params(width: int, hq: int, hk: int, seed: int) -> dict[str, Array]:
    """Weights of one attention layer with heads of 32."""
    sizes = {"query": hq * 32, "key": hk * 32, "value": hk * 32, "out": hq * 32}
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    params = {}
    for (name, size), key in zip(sizes.items(), keys):
        shape = (size, width) if name == "out" else (width, size)
        params[name] = jax.random.normal(key, shape) / np.sqrt(shape[0])
    return params


def layer(params: dict[str, Array], x: Array, attend: Callable) -> Array:
    """Attention between two projections; x is [b, s, width]."""
    q, k, v = (
        (x @ params[name]).reshape(*x.shape[:2], -1, 32) for name in ("query", "key", "value")
    )
    return attend(q, k, v).reshape(*x.shape[:2], -1) @ params["out"]


def train(params, x: Array, target: Array, attend: Callable, steps: int) -> dict:
    """Gradient descent on the squared error; losses, first gradients, seconds per step."""

    def loss(params):
        return jnp.mean((layer(params, x, attend) - target) ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    losses, first, seconds = [], None, []
    for _ in range(steps):
        start = time.perf_counter()
        value, gradients = jax.block_until_ready(step(params))
        seconds.append(time.perf_counter() - start)
        first = first or gradients
        losses.append(float(value))
        params = jax.tree.map(lambda p, g: p - 20.0 * g, params, gradients)
    return {
        "losses": losses,
        "gradients": first,
        "seconds": float(np.median(seconds[1:] or seconds)),
    }


def compare(
    layout: str,
    devices: int,
    seq_len: int,
    window: int | None,
    heads: int,
    kv_heads: int,
    steps: int,
    alibi: bool = False,
    dropout_rate: float = 0.0,
) -> dict:
    """Trains on the ring and on one device; relative errors of losses and first gradients."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("seq",))
    order = token_order(layout, seq_len, devices)
    rng = np.random.default_rng(0)
    ids, width = packed_ids(seq_len, rng), 64
    x = rng.standard_normal((1, seq_len, width)).astype(np.float32)
    side = (None if window is None else window - 1, None)
    mask = IntervalMask.documents(jnp.asarray(ids), causal=True, window=side)

    slopes = 2.0 ** (-8 * jnp.arange(1, heads + 1) / heads) if alibi else None
    words = jax.random.key_data(jax.random.key(0)) if dropout_rate else None

    def whole(q, k, v):
        features = {"alibi_slopes": slopes, "dropout_rate": dropout_rate, "dropout_key": words}
        return flash_attention(q, k, v, mask=mask, **features)

    teacher, student = (init_params(width, heads, kv_heads, seed) for seed in (1, 2))
    target = jax.jit(lambda x: layer(teacher, x, whole))(x)
    one = train(student, x, target, whole, steps)

    rows = IntervalMask(mask.lo[:, order], mask.hi[:, order])
    shard = functools.partial(jax.device_put, device=NamedSharding(mesh, P(None, "seq")))
    ring = sharded_attention(mesh, layout, dropout_rate)
    positions = jax.device_put(order, NamedSharding(mesh, P("seq")))
    arrays = shard(x[:, order]), shard(target[:, order])
    attend = lambda *qkv: ring(*qkv, rows, positions, slopes, words)[0]  # noqa: E731
    several = train(student, *arrays, attend, steps)

    def error(a, b):
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    return {
        "losses": several["losses"],
        "loss_error": error(*(np.array(r["losses"]) for r in (several, one))),
        "gradient_error": max(
            error(np.asarray(several["gradients"][n]), np.asarray(one["gradients"][n]))
            for n in student
        ),
        "seconds": (several["seconds"], one["seconds"]),
    }


def define_flags() -> None:
    """Not on import, where the flags of another example in the process would clash."""
    flags.DEFINE_enum("layout", "all", ["all", *LAYOUTS], "How tokens lie on the devices.")
    flags.DEFINE_integer("devices", 8, "How many; on CPU virtual ones. 0: all there are.", 0)
    flags.DEFINE_integer("seq_len", 2048, "Tokens of the sequence.", 2)
    flags.DEFINE_integer("window", None, "Keys that a row sees; else all before it.", 1)
    flags.DEFINE_integer("heads", 4, "Query heads.", 1)
    flags.DEFINE_integer("kv_heads", 2, "Key heads.", 1)
    flags.DEFINE_integer("steps", 10, "Train steps.", 2)
    flags.DEFINE_bool("alibi", False, "Biases by distance, 2^-(8 n / heads) for head n.")
    flags.DEFINE_float("dropout_rate", 0.0, "The same mask every step, to compare.", 0.0, 1.0)


def main(argv: Sequence[str]) -> None:
    """Runs what the flags say and prints the comparison."""
    given = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a --flag")
    if given.devices:
        jax.config.update("jax_num_cpu_devices", given.devices)
    devices = given.devices or jax.device_count()
    if devices > jax.device_count():
        raise app.UsageError(f"--devices {devices}, but there are {jax.device_count()}")
    print(f"{given.seq_len} tokens over {devices} x {jax.devices()[0].device_kind}")
    for layout in LAYOUTS if given.layout == "all" else (given.layout,):
        result = compare(
            layout, devices, given.seq_len, given.window, given.heads, given.kv_heads,
            given.steps, given.alibi, given.dropout_rate,
        )  # fmt: skip
        ring, one = result["seconds"]
        print(
            f"{layout:>10}: loss {result['losses'][0]:.3f} to {result['losses'][-1]:.3f}; ring "
            f"against one device: losses differ by {result['loss_error']:.0e}, gradients by "
            f"{result['gradient_error']:.0e}; {ring:.3f} s and {one:.3f} s per step"
        )


if __name__ == "__main__":
    define_flags()
    app.run(main)
