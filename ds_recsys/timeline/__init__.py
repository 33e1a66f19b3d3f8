"""Where the time of a training step goes: compute, waiting for others, the optimizer; per rank, and as a trace."""

from ds_recsys.timeline.step_timeline import StepTimeline
from ds_recsys.timeline.step_times import CATEGORIES, StepTimes
from ds_recsys.timeline.summary import Summary

__all__ = ["CATEGORIES", "StepTimeline", "StepTimes", "Summary"]
