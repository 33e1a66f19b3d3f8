"""The grid of ranks: axes pipe x data x tensor, and how a process joins it."""

import hashlib
import os
import socket
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from ds_recsys import compat
from ds_recsys.errors import UserError


@dataclass(frozen=True)
class Grid:
    """Sizes of the three axes. Ranks are laid out with `tensor` fastest and `pipe` slowest.

    So ranks that talk most (tensor, then data) are neighbours, and a pipeline crosses hosts first, as in Megatron-LM
    (https://arxiv.org/abs/2104.04473, section 3).
    """

    pipe: int = 1
    data: int = 1
    tensor: int = 1

    @property
    def world_size(self) -> int:
        return self.pipe * self.data * self.tensor

    def deepspeed(self):
        """The same grid as DeepSpeed's topology, whose name for the tensor axis is `model`."""
        return PipeModelDataParallelTopology(num_pp=self.pipe, num_mp=self.tensor, num_dp=self.data)

    def coordinates(self, rank: int | None = None):
        """Place of `rank` (this process when None) as a tuple with fields pipe, data and model."""
        return self.deepspeed().get_coord(torch.distributed.get_rank() if rank is None else rank)

    def __str__(self) -> str:
        return f"pipe {self.pipe} x data {self.data} x tensor {self.tensor}"


@dataclass(frozen=True)
class TensorAxis:
    """The ranks that share one layer, as one of them sees it: their process group, their number, its own place."""

    group: torch.distributed.ProcessGroup | None = None
    size: int = 1
    rank: int = 0


ALONE = TensorAxis()  # each layer on one rank


def init_distributed(**kwargs) -> None:
    """`deepspeed.init_distributed` that starts on a machine without a compiler; does nothing when already started.

    On CPU the backend is gloo, on GPU NCCL. `kwargs` go to `deepspeed.init_distributed`.

    Raises:
        UserError: the ranks cannot meet, such as when the port is taken.
    """
    if torch.distributed.is_initialized() and deepspeed.comm.is_initialized():
        return
    compat.skip_compiled_collectives()
    if "RANK" not in os.environ:  # a plain `python script.py`: a world of one
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    try:
        deepspeed.init_distributed(**{"auto_mpi_discovery": False, "verbose": False, **kwargs})
    except torch.distributed.DistNetworkError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the ranks cannot meet at {where} ({error}); give the launcher another --master_port"
        ) from error


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def dropout_seeds(seed: int, data_rank: int) -> dict:
    """Keywords of PipelineModule that make dropout a function of (seed, data rank, step, micro-batch, layer).

    So it does not depend on how the layers are cut into stages, and a resumed run draws what the unbroken one would
    have drawn without a generator state being saved. See `compat.seed_dropout` for the step.
    """
    base = int.from_bytes(hashlib.sha256(f"{seed}:{data_rank}".encode()).digest()[:5], "big")
    return {"seed_layers": True, "base_seed": base, "seed_fn": _seed_layer}


def _seed_layer(value: int) -> None:
    """What a layer draws on this rank's device; `torch.manual_seed` would take 1 ms for those that there are not."""
    torch.default_generator.manual_seed(value % 2**63)
    if get_accelerator().device_name() != "cpu":
        get_accelerator().manual_seed(value % 2**63)
