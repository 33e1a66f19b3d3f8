"""A timeline that reports by itself: a line on rank 0 and the monitor's events every so many steps."""

import torch
from tqdm import tqdm

from ds_recsys.timeline.step_timeline import StepTimeline
from ds_recsys.timeline.summary import Summary


class ReportedTimeline(StepTimeline):
    """`StepTimeline` for the config's `recsys.timeline`.

    Args:
        engine: as there.
        options: the block.
        trace_file: where the spans of `options.trace_step` go.
    """

    def __init__(self, engine, options, trace_file):
        super().__init__(engine, options.trace_step, trace_file, keep=max(1000, options.every))
        self._every = options.every

    def on_step(self, step: int) -> None:
        if step % self._every:
            return
        summary = self.summary(last=self._every)
        if torch.distributed.get_rank() == 0:
            tqdm.write(f"step {step}  {summary.line()}")  # above a progress bar, where there is one
            if self.engine.monitor.enabled:
                self.engine.monitor.write_events(_events(summary, self.engine.global_samples))


def _events(summary: Summary, samples: int) -> list[tuple[str, float, int]]:
    figures = {"step": summary.step, "busy": summary.busy, **summary.times}
    return [(f"Timeline/{name}", value, samples) for name, value in figures.items()]
