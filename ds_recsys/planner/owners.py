"""Who sums how much of the gradients where links are unlike. Pure."""

from collections.abc import Callable, Sequence

_UNLIKE = 1.25  # the fastest link to the slowest; below, equal parts are as good
_HALVINGS = 50
_ALL = 1 - 1e-9


def owner_shares(rates: Sequence[float], speeds: Sequence[float] | None = None) -> tuple[float, ...]:
    """Of each of N hosts, the part of a sum over all that it should own, by its link's rate; () where equal parts are as good.

    A host that owns a part f sends 1 + (N - 2) f payloads, and receives as many (`ds_recsys.comm.aggregation.Aggregator`);
    its device encodes 1 + f and decodes 1 + N f. The parts are those with which the last link is done soonest, and of these
    those with which the last device is.

    Args:
        speeds: of the devices; None: all alike.
    """
    hosts = len(rates)
    if hosts < 3 or max(rates) < _UNLIKE * min(rates):
        return ()

    def room(seconds: float) -> list[float]:
        """What each link has time for besides its host's own payload and the sums of all."""
        return [max(0.0, seconds * rate - 1) / (hosts - 2) for rate in rates]

    # from nothing to sum for the slowest to more than equal parts take
    most = room(_least(lambda seconds: sum(room(seconds)) >= 1, 1 / min(rates), 2 / min(rates)))
    speeds = speeds or [1.0] * hosts

    def parts(seconds: float) -> list[float]:
        """What links and devices have time for."""
        free = (max(0.0, seconds * speed - 2) / (hosts + 1) for speed in speeds)
        return [min(*both) for both in zip(most, free, strict=True)]

    shares = parts(_least(lambda seconds: sum(parts(seconds)) >= _ALL, 0.0, (hosts + 3) / min(speeds)))
    return tuple(round(share, 3) for share in shares)


def _least(enough: Callable[[float], bool], low: float, high: float) -> float:
    """The least value from `low` to `high` that is enough, as `high` is."""
    if enough(low):
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def replica_shares(
    hosts: Sequence[int], rates: Sequence[float], slowdowns: Sequence[float], data: int, tensor: int
) -> tuple[float, ...]:
    """The same for the `data` replicas of a grid, who share their host's part; () for equal parts.

    Args:
        hosts: number of the host of each rank of the world.
        rates: of each host's link.
        slowdowns: of each rank's device.
    """
    stage = data * tensor
    starts = [place * tensor for place in range(data)]
    found: dict[int, list[int]] = {}  # host of the first stage -> its replicas
    for place, start in enumerate(starts):
        found.setdefault(hosts[start], []).append(place)
    ranks = [
        [
            first + starts[place] + one
            for place in places
            for first in range(0, len(hosts), stage)
            for one in range(tensor)
        ]
        for places in found.values()
    ]
    slowest = [min(rates[hosts[rank]] for rank in mine) for mine in ranks]
    speeds = [1 / max(slowdowns[rank] for rank in mine) for mine in ranks]
    of_hosts, shares = owner_shares(slowest, speeds), [0.0] * data
    for share, places in zip(of_hosts, found.values(), strict=False):
        for place in places:
            shares[place] = round(share / len(places), 3)
    return tuple(shares) if of_hosts else ()
