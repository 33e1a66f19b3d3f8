"""Which CPU core each device computes on.

A quota alone does not give a speed: the scheduler may leave two busy devices on one core for longer than a step takes.
"""

import os

from ds_recsys.simulation import state


def assign(speeds: list[float], load: dict[int, float]) -> list[int]:
    """A core for each device: the fastest first, each to the core with the least `load` (by core, in cores) so far.

    Longest processing time first (https://doi.org/10.1137/0117039): the fullest core is at most a third over the best.
    """
    load, chosen = dict(load), [0] * len(speeds)
    for device in sorted(range(len(speeds)), key=lambda device: -speeds[device]):
        chosen[device] = min(load, key=lambda core: (round(load[core], 6), core))
        load[chosen[device]] += speeds[device]
    return chosen


def load() -> dict[int, float]:
    """What the devices of this user's other clusters ask of each core that this process may use. Call it `state.locked`."""
    load = dict.fromkeys(sorted(os.sched_getaffinity(0)), 0.0)
    for cluster_id in state.ids():
        found = state.load(cluster_id)
        for host in found["spec"]["hosts"]:
            for core, speed in zip(found["cores"].get(host["name"], []), host["speed"], strict=False):
                if core in load:
                    load[core] += speed
    return load
