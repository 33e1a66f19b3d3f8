"""`StepTimes`: one optimizer step of one rank, in seconds and bytes."""

from dataclasses import dataclass, field

CATEGORIES = ("compute", "pipeline", "gradients", "tensor", "optimizer", "other")


@dataclass(frozen=True)
class StepTimes:
    """Seconds of self time, which add up to `wall`: what a category holds is not also in the one around it.

    Attributes:
        step: the engine's `global_steps` after this step, so the first is 1.
        start: `time.time()` at its begin.
        wall: seconds from begin to end.
        compute: forward and backward, loss and head included.
        pipeline: sending to and receiving from other stages, and collectives that span stages. This is where a stage
            waits for its neighbours.
        gradients: reducing gradients over the data axis and of tied weights, and ZeRO's gathering of updated weights.
        tensor: collectives of the ranks that share a layer.
        optimizer: the update, without its collectives.
        other: the rest, such as loading data.
        payload: bytes that this rank handed to collectives (sent or received point to point), by category; the
            network carries more or less of them, by the algorithm.
        link_bytes: (sent, received) by this host's network interfaces during the step; None but on local rank 0.
    """

    step: int
    start: float
    wall: float
    compute: float
    pipeline: float
    gradients: float
    tensor: float
    optimizer: float
    other: float
    payload: dict[str, int] = field(default_factory=dict)
    link_bytes: tuple[int, int] | None = None

    @property
    def busy(self) -> float:
        """Share of the step that the device computed."""
        return self.compute / self.wall if self.wall else 0.0
