"""Every collective of a step, where torch.distributed hands it to a process group, blocking and asynchronous.

DeepSpeed's communication, our own and a user's all end in the methods of `torch.distributed.ProcessGroup`, and blocking
calls end in `Work.wait`. Both classes are wrapped while a step runs, and only then: evaluation, checkpoints and other
engines are not seen. What C++ calls by itself (functional collectives, `DistributedDataParallel`) is not seen either.
"""

import torch
from torch.distributed import ProcessGroup, Work, get_process_group_ranks

# method of ProcessGroup: (name in the trace, which argument is handed over)
_METHODS = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "allgather": ("all_gather", 1),
    "allgather_coalesced": ("all_gather", 1),
    "_allgather_base": ("all_gather", 1),
    "all_gather_single": ("all_gather", 1),
    "all_gather_single_coalesced": ("all_gather", 1),
    "allgather_into_tensor_coalesced": ("all_gather", 1),
    "gather": ("gather", 1),
    "scatter": ("scatter", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "send": ("send", 0),
    "recv": ("recv", 0),
    "recv_anysource": ("recv", 0),
    "barrier": ("barrier", None),
    "monitored_barrier": ("barrier", None),
    "_end_coalescing": ("coalesced", None),
}


class Collectives:
    """A context in which the step's collectives are recorded; it may be entered again inside, and inside another engine's.

    Args:
        recorder: what is told.
        axes: the grid, which says what a group's collectives count as.
    """

    def __init__(self, recorder, axes):
        self._recorder, self._axes = recorder, axes
        self._categories = {}  # by group, and by peer where two ranks talk
        self._works = {}  # id of an unfinished Work: its category and label
        self._before, self._depth = [], 0

    def begin(self) -> None:
        """A step begins: what the last one left unfinished is no longer waited for in it."""
        self._works.clear()

    def forget_groups(self) -> None:
        """Hold no process group alive."""
        self._categories.clear()
        self._works.clear()

    def __enter__(self):
        self._depth += 1
        if self._depth > 1:
            return
        self._before = [
            (ProcessGroup, name, vars(ProcessGroup)[name]) for name in _METHODS if name in vars(ProcessGroup)
        ]
        for _, name, _ in self._before:
            setattr(ProcessGroup, name, self._launching(getattr(ProcessGroup, name), name))
        self._before.append((Work, "wait", vars(Work)["wait"]))
        Work.wait = self._waiting(Work.wait)

    def __exit__(self, *_):
        self._depth -= 1
        if self._depth:
            return
        for owner, name, original in self._before:
            setattr(owner, name, original)
        self._before = []

    def _launching(self, method, name: str):
        recorder, works, (operation, argument) = self._recorder, self._works, _METHODS[name]
        between_two = operation in ("send", "recv")

        def launch(group, *args, **kwargs):
            category = self._category(group, args[1] if between_two and name != "recv_anysource" else None)
            if category is None or not recorder.listens():
                return method(group, *args, **kwargs)
            if recorder.category == "gradients":
                category = "gradients"
            size = _bytes(args[argument]) if argument is not None and len(args) > argument else 0
            recorder.payload[category] = recorder.payload.get(category, 0) + size
            label = (operation, size, category)
            recorder.enter(category, label)
            try:
                work = method(group, *args, **kwargs)
            finally:
                recorder.leave()
            if isinstance(work, Work):
                works[id(work)] = (category, label)
            return work

        return launch

    def _waiting(self, method):
        recorder, works = self._recorder, self._works

        def wait(work, *args, **kwargs):
            launched = works.pop(id(work), None) if recorder.listens() else None
            if launched is None:
                return method(work, *args, **kwargs)
            category, label = launched
            recorder.enter(category, ("wait for", *label))
            try:
                return method(work, *args, **kwargs)
            finally:
                recorder.leave()

        return wait

    def _category(self, group, peer: int | None) -> str | None:
        key = (group, peer)
        if key not in self._categories:
            ranks = get_process_group_ranks(group)
            if peer is not None:
                ranks = [ranks[peer], torch.distributed.get_rank()]
            self._categories[key] = self._axes.category(ranks)
        return self._categories[key]


def _bytes(tensors) -> int:
    """Of a tensor, or of lists of them to any depth."""
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    if len(tensors) == 1:
        return _bytes(tensors[0])
    return sum(map(_bytes, tensors))
