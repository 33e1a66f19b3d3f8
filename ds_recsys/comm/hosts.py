"""Which ranks share a host, and so its link."""

import os
import socket
from collections import Counter
from collections.abc import Sequence

import torch.distributed as dist


def this_host() -> str:
    """Names the host of this process; a network namespace with a link of its own counts as one."""
    try:
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()


def shared_hosts(
    group: dist.ProcessGroup | None, hierarchical: bool | str, hosts: Sequence | None = None
) -> list[int] | None:
    """The host of each rank of the group as 0, 1, ..., or None where summing within hosts first is not to be done.

    It is done where there are several hosts with equally many ranks each, more than one. Collective without `hosts`.
    """
    if hierarchical is False:
        return None
    if hosts is None:
        hosts = [None] * dist.get_world_size(group)
        dist.all_gather_object(hosts, this_host(), group=group)
    ranks_per_host = Counter(hosts)
    sizes = set(ranks_per_host.values())
    if len(ranks_per_host) == 1 or len(sizes) != 1 or sizes == {1}:
        return None
    numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    return [numbers[host] for host in hosts]
