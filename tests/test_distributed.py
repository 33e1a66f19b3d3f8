"""The grid helper itself: results by rank, failures with their traceback, stuck ranks by name."""

import time

import pytest
import torch
from distributed import distributed, run_on_grid


def _sum_of_ranks():
    total = torch.tensor([torch.distributed.get_rank()])
    torch.distributed.all_reduce(total)
    return torch.distributed.get_rank(), int(total)


def _fail_on_rank_one():
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("deliberate")


def _hang_on_rank_one():
    if torch.distributed.get_rank() == 1:
        time.sleep(60)


@distributed(pipe=2)
def test_body_runs_on_every_rank(tmp_path):
    assert torch.distributed.get_world_size() == 2
    (tmp_path / str(torch.distributed.get_rank())).touch()
    torch.distributed.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_results_come_back_in_rank_order():
    assert run_on_grid(_sum_of_ranks, 3) == [(0, 3), (1, 3), (2, 3)]


def test_failure_names_the_rank():
    with pytest.raises(AssertionError, match="(?s)rank 1 failed.*deliberate"):
        run_on_grid(_fail_on_rank_one, 2)


def test_stuck_rank_is_named_with_its_stack():
    with pytest.raises(AssertionError, match="(?s)rank 1 is stuck.*_hang_on_rank_one"):
        run_on_grid(_hang_on_rank_one, 2, timeout=8)
