"""The byte-level language model of train_lm.py: configuration, modules, loss and train step.

A decoder with grouped-query attention, rotary positions and layers that alternate between a
sliding window and full attention. Batches are packed: `segment_ids` number the documents of a row
(0 for padding), and `positions` restart in each.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jax_flashattn import flash_attention, shifted_sparse_attention

VOCABULARY = 256  # a token is a byte


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run; hashable, so that compiled steps are cached."""

    layers: int
    width: int
    query_heads: int
    kv_heads: int
    head_dim: int
    window: int  # earlier bytes that a sliding-window layer sees
    seq_len: int
    batch: int
    steps: int
    learning_rate: float
    schedule_steps: int = 0  # length of the learning-rate schedule
    dtype: str = "float32"  # of activations and attention inputs; parameters are float32
    seed: int = 0


SIZES = {
    "tiny": Config(4, 128, 4, 2, 32, 128, seq_len=1024, batch=1, steps=1000, learning_rate=4e-3),
    "small": Config(6, 384, 6, 2, 64, 256, seq_len=2048, batch=8, steps=1000, learning_rate=2e-3),
    "base": Config(12, 768, 12, 4, 64, 512, seq_len=8192, batch=8, steps=3000, learning_rate=1e-3),
}


def make_config(size: str, **changes) -> Config:
    """Returns the preset `size` with every change that is not None.

    The schedule is never shorter than the preset's: a run that `steps` stops early, and that is
    resumed later, goes through the same learning rates as a run without the stop.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    config = dataclasses.replace(SIZES[size], **changes)
    return dataclasses.replace(config, schedule_steps=max(SIZES[size].steps, config.steps))


def attend(query, key, value, segment_ids, *, window: int | None, implementation: str):
    """Causal attention within documents: the one place where the implementations differ.

    Args:
        query: [b, s, hq, d]; key, value: [b, s, hk, d], where hk divides hq.
        segment_ids: int32 [b, s], 0 for padding.
        window: how many earlier keys a row sees beside itself; None for all.
        implementation: "kernel", "xla", or "shifted": the kernel, and layers without a window
            attend within groups of a quarter of the row (LongLoRA).

    Returns:
        [b, s, hq, d] in the dtype of query.
    """
    if implementation == "shifted" and window is None:
        group = query.shape[1] // 4
        return shifted_sparse_attention(query, key, value, group, segment_ids=segment_ids)
    if implementation in ("kernel", "shifted"):
        limits = None if window is None else (window, 0)
        return flash_attention(
            query, key, value, causal=True, window=limits, segment_ids=segment_ids
        )
    i, j = jnp.arange(query.shape[1])[:, None], jnp.arange(key.shape[1])[None, :]
    visible = (j <= i) if window is None else (j <= i) & (j >= i - window)
    # Padding sees padding here: a row without keys would have no softmax. What padding rows hold
    # then is finite, no document sees it, and the loss leaves it out.
    same_document = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = (visible & same_document)[:, None]  # bool [b, 1, s, s]: what the kernel does without
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")


def rotate(x, positions):
    """Rotary position embedding (arXiv:2104.09864) of x [b, s, h, d] at int32 [b, s]."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None] * frequency  # float32 [b, s, 1, d/2]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Block(nnx.Module):
    """Grouped-query attention and a gated MLP, each added to the residual stream."""

    def __init__(self, config: Config, window: int | None, rngs: nnx.Rngs):
        self.config, self.window = config, window
        hq, hk, d, width = config.query_heads, config.kv_heads, config.head_dim, config.width

        def linear(features_in, features_out, gain=1.0):
            init = nnx.initializers.normal(gain / math.sqrt(features_in))
            options = {"use_bias": False, "dtype": config.dtype, "kernel_init": init}
            return nnx.Linear(features_in, features_out, rngs=rngs, **options)

        norm = functools.partial(nnx.RMSNorm, dtype=config.dtype, rngs=rngs)
        depth_gain = 1 / math.sqrt(2 * config.layers)  # the residual stream keeps its scale
        self.attention_norm, self.query_norm, self.key_norm = norm(width), norm(d), norm(d)
        self.attention_in = linear(width, (hq + 2 * hk) * d)
        self.attention_out = linear(hq * d, width, depth_gain)
        self.mlp_norm = norm(width)
        self.mlp_in = linear(width, 4 * width)
        self.mlp_out = linear(2 * width, width, depth_gain)

    def __call__(self, x, segment_ids, positions, *, implementation: str):
        """x: [b, s, width]; segment_ids, positions: int32 [b, s]. Returns [b, s, width]."""
        query, key, value = self.before_attention(x)
        query, key = rotate(query, positions), rotate(key, positions)
        choice = {"window": self.window, "implementation": implementation}
        return self.after_attention(x, attend(query, key, value, segment_ids, **choice))

    def before_attention(self, x):
        """Query [b, s, hq, d], key and value [b, s, hk, d] of x [b, s, width], not yet rotated."""
        b, s, _ = x.shape
        hq, hk, d = self.config.query_heads, self.config.kv_heads, self.config.head_dim
        qkv = self.attention_in(self.attention_norm(x)).reshape(b, s, hq + 2 * hk, d)
        query, key, value = jnp.split(qkv, [hq, hq + hk], axis=2)
        return self.query_norm(query), self.key_norm(key), value

    def after_attention(self, x, out):
        """x [b, s, width] with what attention gave, [b, s, hq, d], and the MLP."""
        x = x + self.attention_out(out.reshape(*x.shape[:2], -1))
        gate, up = jnp.split(self.mlp_in(self.mlp_norm(x)), 2, axis=-1)
        return x + self.mlp_out(jax.nn.silu(gate) * up)


class LanguageModel(nnx.Module):
    """A decoder whose layers alternate between a sliding window and full attention."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.dtype = config.dtype
        init = nnx.initializers.normal(1 / math.sqrt(config.width))
        self.embed = nnx.Embed(VOCABULARY, config.width, embedding_init=init, rngs=rngs)
        windows = [None if n % 2 else config.window for n in range(config.layers)]
        self.blocks = nnx.List([Block(config, window, rngs) for window in windows])
        self.norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)

    def __call__(self, tokens, segment_ids, positions, *, implementation: str):
        """tokens, segment_ids, positions: int32 [b, s]. Returns float32 logits [b, s, 256]."""
        x = self.embedded(tokens)
        for block in self.blocks:
            x = block(x, segment_ids, positions, implementation=implementation)
        return self.logits(x)

    def embedded(self, tokens):
        """The blocks' input [b, s, width] for tokens int32 [b, s]."""
        table = self.embed.embedding[...].astype(self.dtype)
        return table[tokens] * math.sqrt(table.shape[1])

    def logits(self, x):
        """Float32 logits [b, s, 256] of the blocks' output, by the table of the input."""
        table = self.embed.embedding[...].astype(self.dtype)
        return jnp.einsum("bsd,vd->bsv", self.norm(x), table, preferred_element_type=jnp.float32)


def build_model(config: Config, rngs: nnx.Rngs) -> LanguageModel:
    """Returns the model with freshly drawn float32 parameters."""
    return LanguageModel(config, rngs)


@functools.cache
def model_graph(config: Config) -> nnx.GraphDef:
    """The model without its arrays: `nnx.merge` with parameters gives it back."""
    return nnx.split(nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0))))[0]


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with gradient clipping, warm-up and cosine decay."""
    rate, steps = config.learning_rate, config.schedule_steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps, rate / 20)
    adamw = optax.adamw(schedule, b2=0.98, weight_decay=0.05)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def init_state(config: Config) -> dict:
    """Returns {"params", "opt_state"}, drawn from `config.seed`: a pytree of arrays."""
    params = nnx.to_pure_dict(nnx.state(build_model(config, nnx.Rngs(config.seed)), nnx.Param))
    return {"params": params, "opt_state": make_optimizer(config).init(params)}


def loss_and_count(params, batch: dict, config: Config, implementation: str):
    """Returns (summed cross-entropy in bits, number of predicted bytes), float32 scalars.

    A byte is predicted from its own document only, so the first byte of each is not predicted.
    """
    model = nnx.merge(model_graph(config), params)
    logits = model(**batch, implementation=implementation)
    tokens, segments = batch["tokens"], batch["segment_ids"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    predicted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return jnp.sum(loss * predicted) / math.log(2), jnp.sum(predicted, dtype=jnp.float32)


def make_train_step(config: Config, implementation: str):
    """Returns the jitted `step(state, batch) -> (state, bits per byte)`; `state` is donated."""
    optimizer = make_optimizer(config)

    def mean_loss(params, batch):
        total, count = loss_and_count(params, batch, config, implementation)
        return total / jnp.maximum(count, 1)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, batch):
        loss, gradients = jax.value_and_grad(mean_loss)(state["params"], batch)
        updates, opt_state = optimizer.update(gradients, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}, loss

    return train_step
