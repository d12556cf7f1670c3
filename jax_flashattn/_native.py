"""Loads the extension modules and registers their kernels with XLA.

`_cpu` always exists in an installed package. `_cuda` is optional: `problems` keeps the reason when
an extension is missing, for `python -m jax_flashattn` and for error messages.
"""

import importlib
from types import ModuleType

import jax

FORWARD = "jax_flashattn_forward"
BACKWARD = "jax_flashattn_backward"
TANGENT = "jax_flashattn_tangent"
APPEND = "jax_flashattn_append"
CACHED = "jax_flashattn_cached"

modules: dict[str, ModuleType] = {}
problems: dict[str, str] = {}


def _load(name: str, platform: str) -> None:
    try:
        module = importlib.import_module(f"jax_flashattn.{name}")
    except ImportError as error:
        problems[platform] = str(error)
        return
    modules[platform] = module
    jax.ffi.register_ffi_target(FORWARD, module.forward(), platform=platform)
    jax.ffi.register_ffi_target(BACKWARD, module.backward(), platform=platform)
    jax.ffi.register_ffi_target(TANGENT, module.tangent(), platform=platform)
    if platform == "cpu":
        jax.ffi.register_ffi_target(CACHED, module.cached(), platform=platform)
    jax.ffi.register_ffi_target(APPEND, module.append(), platform=platform)


_load("_cpu", "cpu")
_load("_cuda", "CUDA")
for _target in (FORWARD, BACKWARD, TANGENT):
    jax.ffi.register_ffi_target_as_batch_partitionable(_target)


def require(platform: str) -> None:
    """Raises ImportError, with the reason, unless the extension for `platform` is loaded."""
    if platform not in modules:
        raise ImportError(
            f"jax_flashattn has no kernels for platform {platform!r}: "
            f"{problems.get(platform, 'not built')}. Run python -m jax_flashattn for the full "
            "picture, and see BUILD.md for how to build the extension."
        )
