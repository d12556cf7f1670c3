"""One frozen record describes a test completely; its repr is the pytest id and reruns it alone."""

import dataclasses

import pytest


@dataclasses.dataclass(frozen=True, repr=False)
class Case:
    """Geometry, options and data of one call of flash_attention.

    Attributes:
      layout: "dense"; "lengths" (lengths_q, lengths_k have one number per batch element);
        "segments" (they have one tuple of document lengths per batch element, a negative number is
        that much padding, the rest of the row is padding too).
      lengths_k: None passes one array for both sides.
      id_cycle: documents are numbered 1, 2, ... or, if not 0, cyclically up to this id.
      interval: shape of a further IntervalMask: None | "random" | "prefix" | "decreasing" | "wild".
      softcap, dropout: static options of the call; the dropout key comes from the data seed.
      alibi: "h" or "bh", the axes of the slopes.
      sinks: whether there are sinks.
      bias: the axes of "bhij" along which the bias is not 1, "" for a single number.
      bias_dtype: None is the dtype of the query.
      dlse: whether the log-sum-exp gets a cotangent.
      poison: "none", "tail" (NaN in padding and behind lengths) or "invisible" (NaN in everything
        that no pair uses).
    """

    b: int = 1
    sq: int = 8
    sk: int = 8
    hq: int = 1
    hk: int = 1
    d: int = 16
    dv: int = 16
    dtype: str = "float32"
    layout: str = "dense"
    lengths_q: tuple | None = None
    lengths_k: tuple | None = None
    id_cycle: int = 0
    interval: str | None = None
    causal: bool = False
    left: int | None = None
    right: int | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi: str | None = None
    sinks: bool = False
    dropout: float = 0.0
    bias: str | None = None
    bias_dtype: str | None = None
    deterministic: bool = False
    dlse: bool = False
    data: str = "gaussian"
    poison: str = "none"
    geometry_seed: int = 0
    data_seed: int = 0

    def __repr__(self) -> str:
        """Only what differs from the defaults, so that ids stay readable and can be evaluated."""
        given = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        )
        return f"Case({', '.join(given)})"

    def replace(self, **changes) -> "Case":
        return dataclasses.replace(self, **changes)

    def options(self) -> dict:
        """The static keyword arguments of flash_attention."""
        window = None if self.left is None and self.right is None else (self.left, self.right)
        return {
            "causal": self.causal,
            "window": window,
            "scale": self.scale,
            "softcap": self.softcap,
            "dropout_rate": self.dropout,
            "deterministic": self.deterministic,
        }


def parse(text: str) -> Case:
    """The Case that a repr describes."""
    return eval(text, {"__builtins__": {}}, {"Case": Case})


def cases(*items: Case):
    """A pytest parametrisation over cases, with their reprs as ids."""
    return pytest.mark.parametrize("case", items, ids=repr)
