"""Fused kernels of other libraries for the whole-catalogue cross-entropy on one CUDA device; none of them is required.

Liger (https://github.com/linkedin/Liger-Kernel) and cut-cross-entropy (https://github.com/apple/ml-cross-entropy) know
neither tensor ranks nor cosine heads. Written after their documented signatures; the tests, which need no GPU, check the
arguments passed and not the kernels themselves.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from ds_recsys.head.shard import HeadShard

_MODULES = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}


def choose(kernel: str, hidden: Tensor, head: HeadShard, label_smoothing: float, reduction: str) -> str:
    """ "torch", "liger" or "cce" for `kernel`, which may also be "auto": the first library that is installed and fits.

    Raises:
        ValueError: an unknown name, or a library asked for by name that does not fit or is not installed.
    """
    if kernel == "torch":
        return kernel
    if kernel not in (*_MODULES, "auto"):
        raise ValueError(f'kernel "{kernel}" is none of "torch", "auto", "liger", "cce"')
    for name in _MODULES if kernel == "auto" else [kernel]:
        obstacle = _obstacle(name, hidden, head, label_smoothing, reduction)
        if obstacle is None:
            return name
        if kernel != "auto":
            raise ValueError(f'kernel "{kernel}" {obstacle}; use kernel="torch"')
    return "torch"


def _obstacle(name: str, hidden: Tensor, head: HeadShard, label_smoothing: float, reduction: str) -> str | None:
    if not hidden.is_cuda:
        return "runs on CUDA only"
    if head.axis.size > 1 or head.cosine or reduction == "none":
        return "has no tensor ranks, no cosine head and no reduction none"
    if name == "cce" and (
        label_smoothing or head.bias is not None or hidden.dtype not in (torch.bfloat16, torch.float16)
    ):
        return "has no label smoothing, bias or fp32 here"
    return None if find_spec(_MODULES[name]) else f"needs the package {_MODULES[name]}"


def summed_loss(kernel: str, hidden: Tensor, target: Tensor, head: HeadShard, label_smoothing: float) -> Tensor:
    """hidden [N, H], target [N] without dropped positions -> 0-d sum of losses, by the library `choose` named."""
    hidden = hidden if head.scale == 1.0 else hidden * head.scale
    bias = head.bias if head.bias is None or head.scale == 1.0 else head.bias * head.scale
    if kernel == "liger":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(
            hidden,
            head.weight,
            target,
            bias=bias,
            label_smoothing=label_smoothing,
            reduction="sum",
            softcap=head.softcap,
            accum_dtype=torch.float32,
        )
    from cut_cross_entropy import linear_cross_entropy

    # Its default leaves out gradients of items below a probability of 2^-12: in a large catalogue, nearly all of them.
    return linear_cross_entropy(hidden, head.weight, target, softcap=head.softcap, reduction="sum", impl="cce_exact")
