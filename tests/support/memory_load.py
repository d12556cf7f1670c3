"""Keeps a GPU's memory busy beside what a test runs: copies on a stream of their own."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator

MEGABYTES = 256


class _Driver:
    """The CUDA driver; a call that fails raises."""

    def __init__(self):
        self._library = ctypes.CDLL("libcuda.so.1")

    def __getattr__(self, name: str):
        function = getattr(self._library, name)

        def call(*arguments):
            status = function(*arguments)
            if status != 0:
                raise RuntimeError(f"{name}: CUDA error {status}")

        return call


def _copy(device: int, stop: threading.Event, rounds: list[int]) -> None:
    driver, context = _Driver(), ctypes.c_void_p()
    stream, buffers = ctypes.c_void_p(), [ctypes.c_uint64(), ctypes.c_uint64()]
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    driver.cuCtxSetCurrent(context)
    driver.cuStreamCreate(ctypes.byref(stream), 1)  # does not wait for other streams
    size = ctypes.c_size_t(MEGABYTES << 20)
    for buffer in buffers:
        driver.cuMemAlloc_v2(ctypes.byref(buffer), size)
    while not stop.is_set():
        for a, b in (buffers, buffers[::-1]):
            driver.cuMemcpyDtoDAsync_v2(a, b, size, stream)
        driver.cuStreamSynchronize(stream)
        rounds.append(1)
    for buffer in buffers:
        driver.cuMemFree_v2(buffer)
    driver.cuStreamDestroy_v2(stream)


@contextlib.contextmanager
def memory_load(device: int = 0) -> Iterator[list[int]]:
    """Copies between two buffers until the block ends; yields a list with an item per round."""
    stop, rounds = threading.Event(), []
    thread = threading.Thread(target=_copy, args=(device, stop, rounds))
    thread.start()
    try:
        yield rounds
    finally:
        stop.set()
        thread.join()
