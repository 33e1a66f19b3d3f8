"""Row-sparse gradients of item tables: a look-up that makes them, their optimizer, their sum over ranks, their norm.

A row-sparse gradient is a sparse COO tensor [R, ...] with one sparse dimension. One that was added up from several
micro-batches or ranks names a row more than once until it is coalesced, and only then has the norm and the squares of
the gradient it stands for.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class RowSparseAdamW(torch.optim.AdamW):
    """AdamW; of a parameter with a row-sparse gradient only the rows in the gradient are updated, lazily.

    Their moments, and weight decay, stand still in the steps that do not touch them, as the moments do in
    torch.optim.SparseAdam (TensorFlow's LazyAdam); bias correction goes by the number of steps of the parameter. With
    every row in the gradient, or with a dense gradient, it is AdamW (https://arxiv.org/abs/1711.05101).

    So a row costs nothing while it is not touched, but a long-unseen item comes back with its old momentum, and is
    decayed less than under AdamW. Arguments, param_groups and state_dict are those of torch.optim.AdamW.

    Raises:
        ValueError: `amsgrad`, `capturable`, `differentiable` or `fused`, which have no lazy form here.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options,
    ):
        refused = [name for name in ("amsgrad", "capturable", "differentiable", "fused") if options.get(name)]
        if refused:
            raise ValueError(f"RowSparseAdamW has no {', '.join(refused)}")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)

    def step(self, closure=None):
        """As torch.optim.AdamW's; gradients are left as they were."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse = [
            (group, parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter.grad.is_sparse
        ]
        for _, parameter, _ in sparse:
            parameter.grad = None  # AdamW passes these by
        super().step()
        for group, parameter, gradient in sparse:
            parameter.grad = gradient
            self._step_rows(group, parameter, gradient)
        return loss

    @torch.no_grad()
    def _step_rows(self, group: dict, parameter: Tensor, gradient: Tensor) -> None:
        state = self.state[parameter]
        if not state:  # the names and types of AdamW's state, so that a dense step may follow
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        values = -values if group["maximize"] else values
        (beta1, beta2), lr, step = group["betas"], float(group["lr"]), state["step"].item()
        mean = state["exp_avg"][rows].lerp_(values, 1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(values, values, value=1 - beta2)
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)
        scale = square.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        new = parameter[rows].mul_(1 - lr * group["weight_decay"])
        parameter.index_copy_(0, rows, new.addcdiv_(mean, scale, value=-lr / (1 - beta1**step)))


def look_up(rows: Tensor, weight: Tensor) -> Tensor:
    """weight[rows]: int64 [...], [R, H] -> [..., H]; the gradient of `weight` is row-sparse and has memory of its own.

    That of F.embedding(sparse=True) is a view of the gradient that arrives. Where that is a buffer which the next
    micro-batch's gradient is received into, as at the end of a pipeline stage, it would be silently overwritten.
    """
    return own_gradient(F.embedding(rows, weight, sparse=True))


def own_gradient(embedded: Tensor) -> Tensor:
    """The identity; the gradient that arrives is copied before it becomes the table's (see `look_up`)."""
    return _OwnGradient.apply(embedded)


class _OwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone(memory_format=torch.contiguous_format)


def all_reduce_rows(gradient: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks of `group` of row-sparse gradients, without a dense table anywhere.

    Three all-gathers: how many rows each rank has, which, and their values, these padded to the largest number.

    Args:
        gradient: sparse COO [R, ...] with one sparse dimension, of one shape, dtype and device type on all ranks; the
            rows may differ in which and how many, and repeat.

    Returns:
        The sum, coalesced, the same bit for bit on every rank.
    """
    gradient = gradient.coalesce()
    size = dist.get_world_size(group)
    if size == 1:
        return gradient
    rows, values = gradient.indices()[0], gradient.values()
    counts = torch.cat(_all_gather(torch.tensor([len(rows)], device=rows.device), size, group)).tolist()
    everywhere = []
    for part in (rows, values):
        padded = part.new_zeros(max(counts), *part.shape[1:])
        padded[: len(part)] = part
        gathered = zip(_all_gather(padded, size, group), counts, strict=True) if max(counts) else []
        everywhere.append(torch.cat([part[:0], *(piece[:count] for piece, count in gathered)]))
    rows, values = everywhere
    return torch.sparse_coo_tensor(rows[None], values, gradient.shape, check_invariants=False).coalesce()


def rows_pay(values: float, looked_up: float, replicas: int, value_bytes: float) -> bool:
    """Whether a table's gradient had better be summed in two parts: most early, and late the rows that were looked up.

    Rows travel as fp32 to all replicas when nothing covers them. They must take a quarter of the bytes that the whole table
    would take then.

    Args:
        values: of the table's gradient.
        looked_up: values of the rows that a replica looks up in a step, at most.
        value_bytes: of a value of the table as it is sent.
    """
    return 4 * 4 * looked_up * (replicas - 1) < 2 * (replicas - 1) / replicas * value_bytes * values


def row_norm_squared(gradient: Tensor) -> Tensor:
    """Sum of squares, fp32 0-d, of a dense or a row-sparse gradient; torch.nn.utils.get_total_norm refuses the latter."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return values.float().square().sum()


def _all_gather(value: Tensor, size: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    pieces = [torch.empty_like(value) for _ in range(size)]
    dist.all_gather(pieces, value, group=group)
    return pieces
