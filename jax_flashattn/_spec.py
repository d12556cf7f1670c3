"""The static half of an attention call: everything that is compiled in."""

import dataclasses

import numpy as np

UNBOUNDED = -1  # how csrc/semantics/mask.h writes an unbounded window side


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What a call fixes at trace time; hashable, so it can be a static argument.

    Attributes:
      scale: factor on query-key products.
      left: how many keys before its aligned key a row sees, None for all (S2).
      right: how many keys after its aligned key a row sees, None for all (S2).
      deterministic: whether the backward must be bitwise repeatable (S14).
      softcap: scores become softcap * tanh(score / softcap); 0 leaves them (S8).
      keep_threshold: of 65536, how many values of a score's random bits keep it (S12).
    """

    scale: float
    left: int | None = None
    right: int | None = None
    deterministic: bool = False
    softcap: float = 0.0
    keep_threshold: int = 65536

    def attributes(self) -> dict[str, np.generic]:
        """The FFI attributes of both kernels (csrc/ffi)."""
        return {
            "scale": np.float64(self.scale),
            "left": np.int64(UNBOUNDED if self.left is None else self.left),
            "right": np.int64(UNBOUNDED if self.right is None else self.right),
            "deterministic": np.bool_(self.deterministic),
            "softcap": np.float64(self.softcap),
            "keep_threshold": np.int64(self.keep_threshold),
        }
