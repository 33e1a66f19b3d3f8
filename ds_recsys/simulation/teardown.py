"""Leave nothing of a cluster: processes, control groups, namespaces, state. Every step can be repeated."""

from ds_recsys.simulation import cgroups, network, processes, state


def group_name(cluster_id: str) -> str:
    """Control group of the devices, which go before the machine's other processes."""
    return f"dsr-{cluster_id}"


def launch_group_name(cluster_id: str) -> str:
    """Control group of the launchers, which do not: starting a job must not slow down the devices of another."""
    return f"dsr-{cluster_id}-launch"


def teardown(cluster_id: str) -> None:
    """All that carries the id is ended and removed, whether or not a state file is left."""
    controller = cgroups.CpuController.find()
    names = (group_name(cluster_id), launch_group_name(cluster_id))
    groups = [controller.root / name for name in names] if controller else []
    processes.kill(processes.CLUSTER_MARK, cluster_id, groups)
    for group in groups:
        cgroups.remove(group)
    network.remove(cluster_id)
    state.remove(cluster_id)


def remove_abandoned() -> list[str]:
    """Tear down the clusters of this user whose owner is dead; their ids. Call it under `state.locked`."""
    abandoned = [cluster_id for cluster_id in state.ids() if not state.owner_alive(cluster_id)]
    for cluster_id in abandoned:
        teardown(cluster_id)
    return abandoned
