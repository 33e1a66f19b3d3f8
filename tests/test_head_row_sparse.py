"""Row-sparse gradients: the optimizer against AdamW, the sum over ranks against dense, and under DeepSpeed's pipelines."""

import copy
from types import MethodType

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_grid
from torch import nn

from ds_recsys.head.row_sparse import RowSparseAdamW, all_reduce_rows, look_up, row_norm_squared
from ds_recsys.topology import Grid


def sparse(rows, values, size=7):
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (size, values.shape[1]))


def train(optimizer, parameters, gradients):
    for gradient in gradients:
        for parameter, value in zip(parameters, gradient, strict=True):
            parameter.grad = value
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(7, 3, generator=generator)), nn.Parameter(torch.randn(3, generator=generator))]


@pytest.mark.parametrize("maximize", [False, True])
def test_with_every_row_in_the_gradient_it_is_adamw(maximize):
    generator = torch.Generator().manual_seed(1)
    dense = [(torch.randn(7, 3, generator=generator), torch.randn(3, generator=generator)) for _ in range(6)]
    order = [4, 0, 1, 2, 6, 3, 5]
    # Every third gradient stays dense: the state is shared. A row comes twice, as before coalescing.
    rows = [
        (
            sparse([*order, 2], torch.cat([g[order], torch.ones(1, 3)]))
            if i % 3
            else g.index_add(0, torch.tensor([2]), torch.ones(1, 3)),
            b,
        )
        for i, (g, b) in enumerate(dense)
    ]
    dense = [(g.index_add(0, torch.tensor([2]), torch.ones(1, 3)), b) for g, b in dense]
    options = {"lr": 0.1, "weight_decay": 0.3, "eps": 1e-3, "betas": (0.8, 0.95), "maximize": maximize}
    expected, ours = parameters(), parameters()
    expected = train(torch.optim.AdamW(expected, **options), expected, dense)
    torch.testing.assert_close(train(RowSparseAdamW(ours, **options), ours, rows), expected)


def test_only_touched_rows_change_with_bias_correction_by_the_step():
    weight = nn.Parameter(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))
    start = weight.detach().clone()
    optimizer = RowSparseAdamW([weight], lr=0.1, weight_decay=0.2, eps=1e-3)
    generator = torch.Generator().manual_seed(1)
    touched = [[1, 4], [4], [], [1, 5], [4, 1]]
    expected, mean, square = start.clone(), torch.zeros(7, 3), torch.zeros(7, 3)
    for step, rows in enumerate(touched, 1):
        values = torch.randn(len(rows), 3, generator=generator)
        weight.grad = sparse(rows, values)
        optimizer.step()
        for row, value in zip(rows, values, strict=True):
            mean[row] = 0.9 * mean[row] + 0.1 * value
            square[row] = 0.999 * square[row] + 0.001 * value**2
            denominator = (square[row] / (1 - 0.999**step)).sqrt() + 1e-3
            expected[row] = expected[row] * (1 - 0.1 * 0.2) - 0.1 * mean[row] / (1 - 0.9**step) / denominator
        assert weight.grad.is_sparse
    torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach()[[0, 2, 3, 6]], start[[0, 2, 3, 6]])
    assert optimizer.state[weight]["exp_avg"][[0, 2, 3, 6]].abs().max() == 0


def test_closure_schedule_and_state_dict():
    table, other = parameters()
    optimizer = RowSparseAdamW([{"params": [table], "lr": 0.5}, {"params": [other], "weight_decay": 0.0}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)

    def closure():
        optimizer.zero_grad()
        loss = look_up(torch.tensor([1, 1, 2]), table).square().sum() + other.square().sum()
        loss.backward()
        return loss

    before = table.detach().clone()
    assert optimizer.step(closure) > 0 and table.grad.is_sparse
    assert not torch.equal(table[1], before[1]) and torch.equal(table[3], before[3])
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0]
    before = table.detach().clone()
    optimizer.step(closure)
    assert torch.equal(table, before)

    states = copy.deepcopy(optimizer.state_dict())  # it shares memory with the optimizer
    again = [nn.Parameter(p.detach().clone()) for p in (table, other)]
    resumed = RowSparseAdamW([{"params": [again[0]]}, {"params": [again[1]]}])
    resumed.load_state_dict(states)
    for one in (optimizer, resumed):
        for group in one.param_groups:
            group["lr"] = 0.1
    gradients = [(sparse([1, 6], torch.ones(2, 3)), torch.ones(3))] * 2
    first, second = train(optimizer, [table, other], gradients), train(resumed, again, gradients)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(ValueError, match="amsgrad, fused"):
        RowSparseAdamW([table], amsgrad=True, fused=True)


def test_norm_of_a_gradient_with_repeated_rows():
    gradient = sparse([1, 3, 1], torch.tensor([[1.0, 2, 3], [4, 5, 6], [1, 1, 1]]))
    for value in (gradient, gradient.to_dense(), gradient.bfloat16()):
        assert row_norm_squared(value).item() == gradient.to_dense().square().sum()
        assert row_norm_squared(value).dtype == torch.float32


def test_look_up_gives_gradients_of_their_own():
    weight = nn.Parameter(torch.randn(7, 3))
    rows, arriving = torch.tensor([[1, 2], [2, 5]]), torch.randn(2, 2, 3)
    output = look_up(rows, weight)
    assert torch.equal(output, weight[rows])
    expected = torch.autograd.grad(weight[rows], weight, arriving)[0]
    output.backward(arriving)
    arriving.zero_()  # as when the buffer is received into again
    assert weight.grad.is_sparse
    torch.testing.assert_close(weight.grad.to_dense(), expected)


def reduce_on_grid():
    size, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    for counts in ([5, 0, 2], [0, 0, 0], [3, 3, 3], [0, 1, 9]):
        rows = [torch.randint(0, 7, (count,), generator=generator) for count in counts[:size]]
        values = [torch.randn(count, 3, generator=generator) for count in counts[:size]]
        gradient = torch.sparse_coo_tensor(rows[rank][None], values[rank], (7, 3))
        total = all_reduce_rows(gradient)
        expected = sum(torch.zeros(7, 3).index_add(0, r, v) for r, v in zip(rows, values, strict=True))
        torch.testing.assert_close(total.to_dense(), expected)
        assert total.is_coalesced() and total._nnz() == len(torch.cat(rows).unique())
        everyone = [None] * size
        dist.all_gather_object(everyone, total.to_dense())
        assert all(torch.equal(everyone[0], other) for other in everyone)
    groups = [dist.new_group([rank]) for rank in range(size)]
    alone = sparse([2, 2], torch.ones(2, 3))
    assert torch.equal(all_reduce_rows(alone, groups[rank]).to_dense(), alone.to_dense())


@pytest.mark.parametrize("ranks", [2, 3])
def test_sum_over_ranks(ranks):
    run_on_grid(reduce_on_grid, ranks)


# Under DeepSpeed: a table whose gradient is row-sparse, at both ends of the model or at its start.


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, rows):
        return look_up(rows, self.weight)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, value):
        return torch.tanh(self.linear(value))


def score(table, hidden):
    return hidden @ look_up(torch.arange(1, 6), table.weight).T


def loss_fn(output, target):
    return (output - target).square().mean()


def batches(data, steps, micro_batches=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 50, (steps, micro_batches, data, 2, 3), generator=generator)


def reference(data, tied, clip, steps=5):
    table, dense = Table(), Dense()
    optimizer = RowSparseAdamW([*table.parameters(), *dense.parameters()], lr=0.05)
    losses = []
    for step in batches(data, steps):
        optimizer.zero_grad()
        hidden = dense(table(step.flatten(end_dim=1)))
        loss = loss_fn(score(table, hidden) if tied else hidden, 1.0)
        loss.backward()
        if clip:
            norm = sum(row_norm_squared(p.grad) for p in [*table.parameters(), *dense.parameters()]).sqrt()
            for parameter in [*table.parameters(), *dense.parameters()]:
                parameter.grad.mul_(min(1.0, clip / (norm.item() + 1e-6)))
        optimizer.step()
        losses.append(loss.item())
    return losses, table.weight.detach()


def under_deepspeed(pipe, data, tied, clip):
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    specs = [TiedLayerSpec("table", Table) if tied else LayerSpec(Table), LayerSpec(Dense)]
    specs += [TiedLayerSpec("table", Table, forward_fn=score)] if tied else []
    grid = Grid(pipe=pipe, data=data)
    net = PipelineModule(
        specs,
        topology=grid.deepspeed(),
        loss_fn=lambda output, target: loss_fn(output, 1.0),
        partition_method="uniform",
    )
    optimizer = RowSparseAdamW(net.parameters(), lr=0.05)
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": clip}
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
    clip_rows(engine)
    reduce_tied_rows(engine)
    rank = engine.grid.get_data_parallel_rank()
    losses = [
        engine.train_batch(iter([(micro[rank], micro[rank]) for micro in step])).item() for step in batches(data, 5)
    ]
    tables = [p.detach() for name, p in net.named_parameters() if p.shape == (50, 4)]
    return losses, tables


def clip_rows(engine):
    """What `compat.clip_tied_weights_once` has to become."""

    def clip_fp32_gradients(self):
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        owned = [row_norm_squared(parameter.grad) for parameter in parameters if not parameter.ds_pipe_replicated]
        square = torch.stack(owned).sum() if owned else torch.zeros((), device=self.device)
        dist.all_reduce(square, group=self.mpu.get_model_parallel_group())
        torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clipping(), square.sqrt())

    engine.clip_fp32_gradients = MethodType(clip_fp32_gradients, engine)


def reduce_tied_rows(engine):
    """DeepSpeed's own all_reduce of a sparse tensor works on gloo; NCCL has none."""
    from deepspeed.runtime.pipe import schedule

    def reduce_tied_grads(self):
        for weight, group in self.module.get_tied_weights_and_groups():
            if weight.grad is not None:
                weight.grad = all_reduce_rows(weight.grad, group)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, schedule.ReduceTiedGrads: reduce_tied_grads}


@pytest.mark.parametrize("pipe, data", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.02])
def test_deepspeed_trains_as_one_process_does(pipe, data, tied, clip):
    losses, table = reference(data, tied, clip)
    for ours, tables in run_on_grid(under_deepspeed, pipe * data, pipe=pipe, data=data, tied=tied, clip=clip):
        torch.testing.assert_close(ours, losses, rtol=1e-5, atol=1e-6)
        assert len(tables) <= 1 and all(torch.allclose(t, table, atol=1e-5) for t in tables)
