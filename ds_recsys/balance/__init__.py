"""Where a pipeline is cut into stages, and how the cut follows what the stages are measured to cost."""
