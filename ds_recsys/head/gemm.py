"""Matrix products of blocks: results wider than their operands, and oneDNN for fp32 on CPU.

torch multiplies fp32 on CPU with the BLAS it was built with; MKL runs at about half of what oneDNN, which torch also
carries, reaches on processors that are not Intel's (AMD EPYC with AVX-512: 100 against 210 GFLOP/s on a core). The
operator called is the one that TorchInductor emits for a linear layer; where a build lacks it, `torch.mm` is used.
"""

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor, scratch: Tensor) -> Tensor:
    """left [M, K] @ right [K, N] as `scratch.dtype`: in `scratch` [M, N] or in new memory, whichever is faster.

    Operands are of one dtype; where it is narrower than the result's, CUDA accumulates and returns fp32, while on CPU
    the product is rounded to the operands' dtype (accumulated in fp32 inside).
    """
    if left.dtype != scratch.dtype:
        if left.is_cuda:
            return torch.mm(left, right, out_dtype=scratch.dtype)
        return scratch.copy_(torch.mm(left, right))
    if _fits_onednn(left, right):
        return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return torch.mm(left, right, out=scratch)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [M, N] += left [M, K] @ right [K, N], summed over the calls in the dtype of `total`."""
    if left.dtype == total.dtype and not _fits_onednn(left, right):
        total.addmm_(left, right)
    elif left.dtype != total.dtype and not left.is_cuda:
        total.add_(torch.mm(left, right))
    else:
        total.add_(product(left, right, total))


def _fits_onednn(left: Tensor, right: Tensor) -> bool:
    return (
        left.device.type == "cpu"
        and left.dtype == torch.float32
        and left.numel() > 0
        and right.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
