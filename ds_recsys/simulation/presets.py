"""Real clusters whose ratio of communication to compute a simulated link reproduces, with the arithmetic."""

from dataclasses import dataclass

from ds_recsys.errors import UserError


@dataclass(frozen=True)
class Preset:
    """A model in data-parallel training on a real cluster.

    Attributes:
        parameters: weights of the model.
        gradient_element_bytes: bytes on the wire per weight.
        hosts, devices_per_host: the cluster.
        link_gbit: rate of one host's link, Gbit/s, in each direction.
        peak_tflops: of one device in the training precision, TFLOP/s, as its maker states it.
        mfu: share of the peak that training reaches (model FLOPs utilisation).
        tokens_per_device: tokens that a device processes in one step.
    """

    name: str
    parameters: float
    gradient_element_bytes: int
    hosts: int
    devices_per_host: int
    link_gbit: float
    peak_tflops: float
    mfu: float
    tokens_per_device: int

    @property
    def world_size(self) -> int:
        return self.hosts * self.devices_per_host

    @property
    def communication_seconds(self) -> float:
        """All-reduce of the gradient: a ring sends 2(N-1)/N of it once over each host's link, in each direction.

        https://arxiv.org/abs/1802.05799 (Horovod) describes the ring.
        """
        sent = _ring(self.world_size) * self.parameters * self.gradient_element_bytes
        return sent * 8 / (self.link_gbit * 1e9)

    @property
    def compute_seconds(self) -> float:
        """Forward and backward: 6 FLOPs per weight and token (https://arxiv.org/abs/2001.08361, table 1)."""
        return 6 * self.parameters * self.tokens_per_device / (self.peak_tflops * 1e12 * self.mfu)

    @property
    def ratio(self) -> float:
        """Communication over compute, both without overlap."""
        return self.communication_seconds / self.compute_seconds

    def rate(self, gradient_bytes: float, compute_seconds: float, world_size: int) -> float:
        """Link rate in bit/s that gives a simulated cluster the same ratio.

        Args:
            gradient_bytes: bytes of the simulated model's gradient on the wire.
            compute_seconds: seconds of forward and backward of its step on one device.
            world_size: number of simulated devices, at least 2.
        """
        if world_size < 2:
            raise UserError(f"link preset {self.name}: a cluster of one device exchanges no gradient")
        return _ring(world_size) * gradient_bytes * 8 / (self.ratio * compute_seconds)

    def describe(self) -> str:
        """The arithmetic, in three lines."""
        n = self.world_size
        return (
            f"{self.name}: {self.parameters:.3g} parameters on {self.hosts} hosts x {self.devices_per_host} devices, "
            f"{self.link_gbit:g} Gbit/s a host\n"
            f"  communication: 2({n}-1)/{n} x {self.parameters:.3g} x {self.gradient_element_bytes} bytes / "
            f"{self.link_gbit / 8:g} GB/s = {self.communication_seconds:.3g} s\n"
            f"  compute: 6 x {self.parameters:.3g} x {self.tokens_per_device} tokens / "
            f"({self.peak_tflops:g} TFLOP/s x {self.mfu:g}) = {self.compute_seconds:.3g} s; ratio {self.ratio:.3g}"
        )


def _ring(world_size: int) -> float:
    return 2 * (world_size - 1) / world_size


def _a100(link_gbit: float) -> Preset:
    return Preset(
        name=f"8b-16xa100-{link_gbit:g}gbe",
        parameters=8e9,
        gradient_element_bytes=2,
        hosts=2,
        devices_per_host=8,
        link_gbit=link_gbit,
        peak_tflops=312,
        mfu=0.4,
        tokens_per_device=6144,
    )


PRESETS = {preset.name: preset for preset in map(_a100, (25, 100, 400))}
