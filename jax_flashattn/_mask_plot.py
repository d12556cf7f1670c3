"""The picture of a mask: what is visible, over the classes of the tiles it lies in."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_flashattn import _mask
from jax_flashattn._checks import check_size

MOST_PIXELS = 1024  # per side; longer sequences are sampled
MOST_TILES = 64  # per side; more would be only lines

# Colour of (tile class, visible).
COLOURS = {
    "full tile": (_mask.FULL, True, "#3b6fb6"),
    "partial tile, visible": (_mask.PARTIAL, True, "#e8893c"),
    "partial tile, masked": (_mask.PARTIAL, False, "#fbdcbc"),
    "skipped tile": (_mask.SKIP, False, "#f4f4f2"),
}


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError(
            "IntervalMask.plot needs matplotlib: pip install 'jax_flashattn[plot]'."
        ) from error
    return Figure, Patch


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[n : n + 2], 16) for n in (1, 3, 5))


def _image(limits: _mask.Intervals, classes: np.ndarray, sk: int, tile) -> np.ndarray:
    """RGB [rows, keys] of one batch element, sampled down to at most MOST_PIXELS a side."""
    lo, hi = (np.asarray(x)[:, None] for x in limits)
    i, j = (np.arange(min(n, MOST_PIXELS)) * n // min(n, MOST_PIXELS) for n in (lo.shape[0], sk))
    see = (lo[i] <= j) & (j < hi[i])
    kind = classes[i[:, None] // tile[0], j // tile[1]]
    image = np.zeros((*see.shape, 3), np.uint8)
    for of_class, visible, colour in COLOURS.values():
        image[(kind == of_class) & (see == visible)] = _rgb(colour)
    return image


def _panel(
    axes: Any, limits: _mask.Intervals, classes: np.ndarray, sk: int, tile: tuple[int, int]
) -> None:
    """One batch element."""
    sq = limits[0].shape[0]
    axes.imshow(_image(limits, classes, sk, tile), extent=(0, sk, sq, 0), interpolation="nearest")
    if max(classes.shape) <= MOST_TILES:
        axes.hlines(np.arange(tile[0], sq, tile[0]), 0, sk, colors="white", linewidth=0.8)
        axes.vlines(np.arange(tile[1], sk, tile[1]), 0, sq, colors="white", linewidth=0.8)
    axes.set(xlim=(0, sk), ylim=(sq, 0), xlabel="key j", ylabel="query i")
    axes.tick_params(length=2, labelsize="small")
    shares = [(classes == kind).mean() for kind in (_mask.FULL, _mask.PARTIAL, _mask.SKIP)]
    text = "tiles: {:.0%} full, {:.0%} partial, {:.0%} skipped".format(*shares)
    axes.set_title(text, fontsize="small")


def draw(
    limits: _mask.Intervals, sk: int, batch: Sequence[int], tile: tuple[int, int], axes: Any
) -> Any:
    """The figure that IntervalMask.plot describes."""
    Figure, Patch = _matplotlib()
    sk = check_size("sk", sk, least=1)
    tile = (check_size("tile", tile[0], least=1), check_size("tile", tile[1], least=1))
    b, sq = limits[0].shape
    batch = [check_size("batch", n) for n in batch]
    if not batch or max(batch) >= b or sq == 0:
        raise ValueError(f"batch must name elements of a mask of shape {(b, sq)}, got {batch}.")
    alone = axes is None
    if alone:
        figure = Figure(figsize=(3.6 * len(batch) + 0.4, 4.2), layout="constrained")
        axes = figure.subplots(1, len(batch), squeeze=False)[0]
    axes = np.atleast_1d(axes)
    if len(axes) != len(batch):
        raise ValueError(f"axes must be one per batch element, got {len(axes)} for {batch}.")
    at = jnp.asarray(batch)
    lo, hi = limits[0][at], limits[1][at]
    classes = np.asarray(_mask.tile_classes((lo, hi), sk, *tile))
    for n, panel in enumerate(axes):
        _panel(panel, (lo[n], hi[n]), classes[n], sk, tile)
        if len(batch) > 1:
            panel.set_title(f"batch {batch[n]}, {panel.get_title()}", fontsize="small")
    figure = axes[0].figure
    if alone:
        handles = [Patch(color=c, label=label) for label, (_, _, c) in COLOURS.items()]
        columns = min(len(handles), 2 * len(batch))
        figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, fontsize="small",
            frameon=False,
        )  # fmt: skip
    return figure
