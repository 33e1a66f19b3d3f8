"""Averages on their way: a thread reduces flat buffers one after the other while the training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_recsys.comm.modes.flat import FlatParameters
from ds_recsys.comm.reducer import Reducer


class Courier:
    """One thread for all reductions of a mode. All ranks of the data axis send theirs in the same order.

    Args:
        ranks: of the data axis; sums are divided by it.
    """

    def __init__(self, ranks: int):
        self._ranks = ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data-parallel-mode")

    def send(self, reducer: Reducer, flat: Tensor, parameters: FlatParameters) -> "Travelling":
        """Start to average `flat`, which belongs to the thread until `Travelling.wait` returns it."""
        accelerator = get_accelerator()
        if accelerator.resolves_data_dependency():  # on the CPU, the values are there
            return Travelling(self._thread.submit(self._average, reducer, flat, parameters), flat)
        computed = accelerator.Event()
        computed.record(accelerator.current_stream())
        device = torch.cuda.current_device()
        return Travelling(self._thread.submit(self._on_stream, reducer, flat, parameters, computed, device), flat)

    def _average(self, reducer: Reducer, flat: Tensor, parameters: FlatParameters) -> None:
        if parameters.shapes:
            reducer.all_reduce(flat, parameters.shapes)
            flat.div_(self._ranks)

    def _on_stream(self, reducer: Reducer, flat: Tensor, parameters: FlatParameters, computed, device: int):
        accelerator = get_accelerator()
        accelerator.set_device(device)
        stream = accelerator.Stream()
        with accelerator.stream(stream):
            stream.wait_event(computed)
            self._average(reducer, flat, parameters)
            done = accelerator.Event()
            done.record(stream)
        return done

    def close(self) -> None:
        """End the thread, after what it still has to do."""
        self._thread.shutdown()


@dataclass
class Travelling:
    """A buffer that is being averaged."""

    future: Future
    flat: Tensor

    def wait(self) -> Tensor:
        """The average, in the memory that was sent. What the thread raised is raised here."""
        done = self.future.result()
        if done is not None:
            get_accelerator().current_stream().wait_event(done)
        return self.flat
