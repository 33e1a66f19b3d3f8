"""`Rounds`: local_sgd and diloco. Replicas train alone; every H steps they average how far they came, all or in parts."""

import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys.comm.modes import fragments
from ds_recsys.comm.modes.flat import FlatParameters
from ds_recsys.comm.modes.local import LocalMode
from ds_recsys.comm.modes.outer import nesterov
from ds_recsys.comm.modes.travel import Courier, Travelling
from ds_recsys.comm.reducer import Reducer
from ds_recsys.errors import UserError


class Rounds(LocalMode):
    """Local SGD (https://arxiv.org/abs/1808.07217, "post-local" with `dense_until`) and DiLoCo
    (https://arxiv.org/abs/2311.08105), streaming with `fragments`, `overlap_steps` and `mixing`
    (https://arxiv.org/abs/2501.18512).

    Every replica knows the outer weights of each fragment, the same everywhere. When a fragment leaves, its change, outer
    weights - own weights, is averaged as the compression block says, with error feedback; when the average arrives, the
    outer optimizer steps, and the replica's weights become mixing x own + (1 - mixing) x outer. In local_sgd the outer
    weights become the average itself. A change with a NaN or an infinity is dropped: all replicas go back to the outer weights.
    """

    def __init__(self, engine, options, compression):
        super().__init__(engine, options, compression)
        names = fragments.assign(self._stages(), options.fragments)
        self._fragments = [
            _Fragment(self.parameters.subset({n for n, of in names.items() if of == number}), self.make_reducer())
            for number in range(options.fragments)
        ]
        averaging = options.mode == "local_sgd"
        self._lr, self._momentum = (1.0, 0.0) if averaging else (options.outer_lr, options.outer_momentum)
        self._courier = Courier(self.data_size)
        self.rounds, self.seconds_waited = 0, 0.0

    def _stages(self) -> list[Mapping[str, int]]:
        """The parameters of the replica, stage by stage; tensor ranks that hold shares of one differ in its size."""
        mine = {name: parameter.numel() for name, parameter in self.parameters.items()}
        everyone: list = [None] * dist.get_world_size(self.replica_group)
        dist.all_gather_object(everyone, (self.place["pipe_rank"], mine), group=self.replica_group)
        stages: dict[int, dict[str, int]] = {}
        for stage, sizes in everyone:
            for name, size in sizes.items():
                known = stages.setdefault(stage, {})
                known[name] = max(size, known.get(name, 0))
        return [stages[stage] for stage in sorted(stages)]

    def begin_step(self) -> None:
        for fragment in self._fragments:
            if fragment.outer is None:
                fragment.outer = fragment.parameters.read()
            fragment.apart = True

    def after_step(self) -> None:
        step = self.steps - self.options.dense_until
        if step <= 0:
            return
        for number, fragment in enumerate(self._fragments):
            if fragment.arrives == self.steps:
                self._receive(fragment, self.options.mixing)
            if fragments.leaves(number, step, self.options.every, len(self._fragments)):
                self._send(fragment, self.steps + self.options.overlap_steps)
                if not self.options.overlap_steps:
                    self._receive(fragment, self.options.mixing)
        self.apart = any(fragment.apart for fragment in self._fragments)

    def _send(self, fragment: "_Fragment", arrives: int) -> None:
        change = fragment.parameters.read()
        torch.sub(fragment.outer, change, out=change)
        fragment.travelling = self._courier.send(fragment.reducer, change, fragment.parameters)
        fragment.arrives = arrives

    def _arrived(self, fragment: "_Fragment") -> Tensor | None:
        """The average change; None where it is not finite. What is sent later no longer depends on it."""
        if fragment.travelling is not None:
            begin = time.perf_counter()
            with self.watched():
                average = fragment.travelling.wait()
            self.seconds_waited += time.perf_counter() - begin
            finite = self.agreed(bool(average.sum().isfinite()))
            fragment.reducer.commit() if finite else fragment.reducer.discard()
            fragment.average, fragment.travelling = average if finite else None, None
        return fragment.average

    def _receive(self, fragment: "_Fragment", mixing: float) -> None:
        average = self._arrived(fragment)
        if average is None:
            mixing = 0.0
            self.warn_dropped()
        else:
            if self._momentum and fragment.velocity is None:
                fragment.velocity = torch.zeros_like(average)
            nesterov(fragment.outer, average, fragment.velocity, self._lr, self._momentum)
        weights = fragment.outer
        if mixing:
            weights = torch.lerp(fragment.outer, fragment.parameters.read(), mixing)
        fragment.parameters.write(weights)
        fragment.apart, fragment.arrives, fragment.average = mixing > 0, None, None
        self.rounds += 1

    def flush(self) -> None:
        """The round ends here: what is under way arrives, and what came since is sent and arrives too. Collective."""
        if self.apart:
            for fragment in self._fragments:
                if fragment.arrives is not None:
                    self._receive(fragment, self.options.mixing)
            for fragment in self._fragments:
                if fragment.apart:
                    self._send(fragment, self.steps)
                    self._receive(fragment, 0.0)
        for fragment in self._fragments:
            fragment.outer = None  # read anew, should someone load other weights meanwhile
        self.apart = False

    def consensus_weights(self) -> Tensor:
        """In local_sgd the mean of the replicas' weights now, in diloco the outer weights."""
        if self.options.mode == "local_sgd":
            return self.average(self.parameters.read())
        outer = {}
        for fragment in self._fragments:
            outer |= fragment.parameters.as_dict(fragment.outer)
        return self.parameters.from_dict(outer)

    def state_dict(self) -> dict:
        content = super().state_dict()
        held = [fragment.state_dict(self._arrived(fragment)) for fragment in self._fragments]
        content["shared"] = {"fragments": held, "rounds": self.rounds}
        content["own"]["reducers"] = [fragment.reducer.state_dict() for fragment in self._fragments]
        return content

    def load_state_dict(self, content: dict) -> None:
        super().load_state_dict(content)
        held = content.get("shared", {}).get("fragments", [{} for _ in self._fragments])
        if len(held) != len(self._fragments):
            raise UserError(
                f'recsys.data_parallel: saved with "fragments" {len(held)}, this run has {len(self._fragments)}; make them '
                "equal, or start without --resume"
            )
        alone = "own" not in content
        for fragment, state in zip(self._fragments, held, strict=True):
            fragment.load_state_dict(state)
            if alone:  # the weights there are, are the outer ones
                fragment.outer, fragment.apart = None, False
        for fragment, state in zip(self._fragments, content.get("own", {}).get("reducers", []), strict=False):
            fragment.reducer.load_state_dict(state)
        self.rounds = content.get("shared", {}).get("rounds", 0)

    def as_dict(self) -> dict:
        totals = [fragment.reducer.totals for fragment in self._fragments]
        return {
            **super().as_dict(),
            "rounds": self.rounds,
            "sent_bytes": sum(total.sent_bytes for total in totals),
            "seconds": sum(total.seconds for total in totals),
            "seconds_waited": self.seconds_waited,
        }

    def close(self) -> None:
        super().close()
        self._courier.close()


class _Fragment:
    """Weights that travel together, and what is known of them.

    Attributes:
        outer: fp32 [n], the outer weights; None: those that the replica holds.
        velocity: of the outer optimizer.
        travelling, average: the change on its way, and when it has been waited for, its average.
        arrives: the step after which it is applied; None: nothing is under way.
        apart: whether the replica's weights may be others than the outer ones.
    """

    def __init__(self, parameters: FlatParameters, reducer: Reducer):
        self.parameters, self.reducer = parameters, reducer
        self.outer: Tensor | None = None
        self.velocity: Tensor | None = None
        self.travelling: Travelling | None = None
        self.average: Tensor | None = None
        self.arrives: int | None = None
        self.apart = False

    def state_dict(self, average: Tensor | None) -> dict:
        named = {"outer": self.outer, "velocity": self.velocity, "average": average}
        kept = {key: self.parameters.as_dict(value) for key, value in named.items() if value is not None}
        return {**kept, "arrives": self.arrives, "apart": self.apart}

    def load_state_dict(self, state: dict) -> None:
        for key in ("outer", "velocity", "average"):
            setattr(self, key, self.parameters.from_dict(state[key]) if key in state else None)
        self.arrives, self.apart, self.travelling = state.get("arrives"), state.get("apart", False), None
