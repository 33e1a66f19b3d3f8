"""A cluster of hosts with their own link rates and device speeds, made of processes on one Linux machine."""

from ds_recsys.simulation.calibration import Reading, report
from ds_recsys.simulation.cluster import Cluster
from ds_recsys.simulation.job import Job
from ds_recsys.simulation.presets import PRESETS, Preset
from ds_recsys.simulation.spec import ClusterSpec, Event, Host, Link, load_spec

__all__ = [
    "PRESETS",
    "Cluster",
    "ClusterSpec",
    "Event",
    "Host",
    "Job",
    "Link",
    "Preset",
    "Reading",
    "load_spec",
    "report",
]
