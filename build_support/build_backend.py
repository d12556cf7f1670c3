"""scikit-build-core, plus the CUDA compiler as a build requirement when it is asked for.

JAX_FLASHATTN_CUDA=on with no nvcc on the machine adds NVIDIA's pip compiler packages. All five are
pinned to one release: unpinned, nvcc pulls a newer nvvm than its own ptxas understands, and it does
not pull cccl at all.
"""

import os
import shutil
from pathlib import Path

from scikit_build_core.build import *  # noqa: F403
from scikit_build_core.build import get_requires_for_build_wheel as _requires

CUDA_COMPILER = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]


def _has_nvcc() -> bool:
    home = os.environ.get("CUDA_HOME")
    return bool(shutil.which("nvcc") or (home and (Path(home) / "bin" / "nvcc").exists()))


def get_requires_for_build_wheel(config_settings=None):
    requires = _requires(config_settings)
    if os.environ.get("JAX_FLASHATTN_CUDA", "auto").lower() == "on" and not _has_nvcc():
        requires = [*requires, *CUDA_COMPILER]
    return requires


get_requires_for_build_editable = get_requires_for_build_wheel
