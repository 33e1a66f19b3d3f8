"""Who sums how much of the gradients where links are unlike. Pure."""

from collections.abc import Sequence

_UNLIKE = 1.25  # the fastest link to the slowest; below, equal parts are as good
_HALVINGS = 50


def owner_shares(rates: Sequence[float]) -> tuple[float, ...]:
    """Of each of N hosts, the part of a sum over all that it should own, by its link's rate; () where equal parts are as good.

    A host that owns a part f sends 1 + (N - 2) f payloads, and receives as many (`ds_recsys.comm.aggregation.Aggregator`).
    The parts are those with which the last link is done soonest, and among them the most equal.
    """
    hosts = len(rates)
    if hosts < 3 or max(rates) < _UNLIKE * min(rates):
        return ()

    def room(seconds: float) -> list[float]:
        """What each link has time for besides its host's own payload and the sums of all."""
        return [max(0.0, seconds * rate - 1) / (hosts - 2) for rate in rates]

    low, high = 1 / min(rates), 2 / min(rates)  # nothing to sum for the slowest; more than equal parts take
    if sum(room(low)) >= 1:
        high = low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(room(middle)) >= 1 else (middle, high)
    shares, left = [0.0] * hosts, 1.0
    most = room(high)
    for place, host in enumerate(sorted(range(hosts), key=most.__getitem__)):
        shares[host] = min(most[host], left / (hosts - place))
        left -= shares[host]
    return tuple(round(share, 3) for share in shares)


def replica_shares(hosts: Sequence[int], rates: Sequence[float], data: int, tensor: int) -> tuple[float, ...]:
    """The same for the `data` replicas of a grid, who share their host's part; () for equal parts.

    Args:
        hosts: number of the host of each rank of the world.
        rates: of each host's link.
    """
    stage = data * tensor
    starts = [place * tensor for place in range(data)]
    found: dict[int, list[int]] = {}  # host of the first stage -> its replicas
    for place, start in enumerate(starts):
        found.setdefault(hosts[start], []).append(place)
    slowest = [
        min(rates[hosts[first + starts[place]]] for place in places for first in range(0, len(hosts), stage))
        for places in found.values()
    ]
    of_hosts, shares = owner_shares(slowest), [0.0] * data
    for share, places in zip(of_hosts, found.values(), strict=False):
        for place in places:
            shares[place] = round(share / len(places), 3)
    return tuple(shares) if of_hosts else ()
