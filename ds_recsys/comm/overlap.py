"""Buckets of gradients, each reduced as soon as the backward pass is done with it, in a thread of its own."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator
from torch.nn import Parameter

from ds_recsys.comm.layout import bucket_lengths


@dataclass(frozen=True)
class Bucket:
    """Parameters whose gradients are reduced together, of one dtype; `early`: as soon as they are final."""

    parameters: tuple[Parameter, ...]
    early: bool = True


def make_buckets(parameters: Sequence[Parameter], late: set[Parameter], elements: int) -> list[Bucket]:
    """Cut the parameters, last first as a backward pass meets them, into buckets of `elements` values: see `bucket_lengths`.

    Those in `late` (tied weights, which other stages contribute to) come in buckets of their own at the end.
    """
    buckets: list[Bucket] = []
    for early in (True, False):
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            chosen = [p for p in parameters if p.dtype == dtype and (p not in late) == early]
            for length in reversed(bucket_lengths([p.numel() for p in chosen], elements)):
                buckets.append(Bucket(tuple(reversed(chosen[-length:])), early))
                del chosen[-length:]
    return buckets


class OverlappedBuckets:
    """Reduces each bucket once a step: `early` ones from the moment their gradients are final, in order, in a thread.

    How often a parameter's gradient is added to in a micro-batch is counted in the first step, in which nothing is early.
    All ranks of a data-parallel group start the buckets in the same order, whatever their backward passes do.

    Args:
        reduce: called with a bucket; a thread of this object's own calls it, one bucket at a time.
        micro_batches: how many there are in a step.
        early: False reduces all of them when `finish` is called.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        reduce: Callable[[Bucket], None],
        micro_batches: Callable[[], int],
        early: bool = True,
    ):
        self.buckets = buckets
        self._reduce, self._micro_batches = reduce, micro_batches
        self._index = {p: number for number, bucket in enumerate(buckets) for p in bucket.parameters}
        self._additions: dict[Parameter, int] = {}  # in this step
        self._per_micro_batch: dict[Parameter, int] | None = None
        self._waiting: list[int] = []
        self._futures: list = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compressed-all-reduce") if early else None
        self._hooks = []
        if early:
            self._hooks = [p.register_post_accumulate_grad_hook(self._added) for p in self._index]
        self._restart()

    def _restart(self) -> None:
        self._additions = dict.fromkeys(self._index, 0)
        self._waiting = [len(bucket.parameters) if bucket.early else -1 for bucket in self.buckets]
        self._futures = []

    def _added(self, parameter: Parameter) -> None:
        """A backward pass added to a gradient."""
        self._additions[parameter] += 1
        if self._per_micro_batch is None:
            return
        additions, final = self._additions[parameter], self._per_micro_batch[parameter] * self._micro_batches()
        number = self._index[parameter]
        if additions > final and number < len(self._futures):
            raise RuntimeError(
                f"a gradient of {tuple(parameter.shape)} was added to after it had been sent: this model's backward pass "
                'differs between steps, so set "overlap": false in recsys.compression'
            )
        if additions == final:
            self._waiting[number] -= 1
            while len(self._futures) < len(self.buckets) and self._waiting[len(self._futures)] == 0:
                self._start()

    def _start(self) -> None:
        """Hand the next bucket to the thread."""
        bucket = self.buckets[len(self._futures)]
        accelerator = get_accelerator()
        if accelerator.resolves_data_dependency():  # on the CPU, the values are there
            self._futures.append(self._thread.submit(self._reduce, bucket))
            return
        computed = accelerator.Event()
        computed.record(accelerator.current_stream())
        self._futures.append(self._thread.submit(self._reduce_on_stream, bucket, computed, torch.cuda.current_device()))

    def _reduce_on_stream(self, bucket: Bucket, computed, device: int):
        """On a GPU: on a stream of the thread's own, after what computes the gradients; returns the event of its end."""
        accelerator = get_accelerator()
        accelerator.set_device(device)
        stream = accelerator.Stream()
        with accelerator.stream(stream):
            stream.wait_event(computed)
            self._reduce(bucket)
            done = accelerator.Event()
            done.record(stream)
        return done

    def finish(self) -> None:
        """Reduce what has not been, and wait for all of it. What the thread raised is raised here."""
        if self._thread is None:
            for bucket in self.buckets:
                self._reduce(bucket)
            return
        if self._per_micro_batch is None:
            micro_batches = self._micro_batches()
            counted = {p: divmod(count, micro_batches) for p, count in self._additions.items()}
            # what is added to irregularly is never early: its bucket waits for `finish`
            self._per_micro_batch = {p: each if each and not rest else -1 for p, (each, rest) in counted.items()}
        while len(self._futures) < len(self.buckets):
            self._start()
        futures = self._futures
        self._restart()
        for future in futures:
            done = future.result()
            if done is not None:
                get_accelerator().current_stream().wait_event(done)

    def close(self) -> None:
        """Take the hooks off and end the thread."""
        for hook in self._hooks:
            hook.remove()
        if self._thread:
            self._thread.shutdown()
