"""How fast a compressor encodes."""

import time
from statistics import median

import torch

from ds_recsys.comm.compressors.base import Compressor


def throughput(compressor: Compressor, numel: int, repeats: int) -> float:
    """GB/s (1e9 bytes) of fp32 gradient through `encode` with error feedback, on one thread: the median of `repeats`.

    Each repeat reads a gradient and a residual and writes codes and the next residual, as a training step does.
    """
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(numel, generator=generator)
    residual, error = torch.zeros(numel), torch.zeros(numel)
    payload = torch.zeros(compressor.wire_bytes(numel), dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compressor.encode(gradient, payload, residual=residual, error=error)  # builds the kernels, touches the pages
        seconds = []
        for _ in range(repeats):
            residual, error = error, residual
            start = time.perf_counter()
            compressor.encode(gradient, payload, residual=residual, error=error)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 4 * numel / median(seconds) / 1e9
