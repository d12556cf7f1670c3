"""Draws docs/images/masks.png: python docs/draw_masks.py."""

import pathlib

import jax.numpy as jnp
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jax_flashattn import IntervalMask
from jax_flashattn._mask_plot import COLOURS

S, TILE = 512, (64, 64)
IDS = jnp.repeat(jnp.array([[1, 2, 3, 4, 0]], jnp.int32), jnp.array([90, 220, 60, 110, 32]), axis=1)
ZIGZAG = jnp.concatenate([jnp.arange(64, 128), jnp.arange(384, 448)])

PANELS = (
    ("causal(512)", IntervalMask.causal(S), S),
    ("sliding_window(512, 512, 128, 0)", IntervalMask.sliding_window(S, S, 128, 0), S),
    ("prefix([160], 512)", IntervalMask.prefix(jnp.array([160]), S), S),
    ("chunked(512, 128)", IntervalMask.chunked(S, 128), S),
    ("documents(ids)", IntervalMask.documents(IDS), S),
    ("documents(ids, causal=True)", IntervalMask.documents(IDS, causal=True), S),
    (
        "documents(...) & sliding_window(...)",
        IntervalMask.documents(IDS, causal=True) & IntervalMask.sliding_window(S, S, 64, 0),
        S,
    ),
    ("causal(512).for_positions(shard)", IntervalMask.causal(S).for_positions(ZIGZAG), 128),
)


def main() -> None:
    """One panel per constructor, two rows of four."""
    figure = Figure(figsize=(12, 6.8), layout="constrained")
    for axes, (title, mask, sk) in zip(figure.subplots(2, 4).flat, PANELS):
        mask.plot(sk, tile=TILE, axes=axes)
        axes.set_title(f"{title}\n{axes.get_title()}", fontsize="small")
        axes.set(xticks=range(0, sk + 1, 128), yticks=range(0, S + 1, 128))
        axes.set(aspect="auto", box_aspect=1)
    handles = [Patch(color=colour, label=label) for label, (_, _, colour) in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    path = pathlib.Path(__file__).parent / "images" / "masks.png"
    figure.savefig(path, dpi=110, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
