"""The "partition" block: how the layers are cut into pipeline stages."""

from pydantic import Field, field_validator, model_validator

from ds_recsys.config.base import Block, NonNegative

MEASURED = ("profile", "adaptive")  # methods that start from "parameters", or from `bounds`, and move layers later


class Partition(Block):
    """How the layers are cut into pipeline stages."""

    method: str = Field(
        "parameters",
        description='What is balanced over the stages: `"parameters"` (trainable parameters), `"uniform"` (layers) or '
        '`"type:REGEX"` (layers whose class name matches), as in DeepSpeed\'s PipelineModule; `"profile"`: the measured step, '
        'after the first steps, corrected once or twice; `"adaptive"`: all the time, moving layers of the running pipeline.',
    )
    bounds: list[NonNegative] | None = Field(
        None,
        description="The cuts themselves, in place of `method` (with `profile` and `adaptive`: the first ones): stage s holds "
        "pipeline layers bounds[s] to bounds[s+1] - 1, so there are `pipe` + 1 values, the first 0, the last the number of "
        "pipeline layers.",
    )
    min_gain: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="adaptive: share of the step that a move must promise to save, and win back its pause.",
    )
    memory_gb: float | None = Field(
        None,
        gt=0,
        description="profile, adaptive: what a rank may hold of weights, gradients, optimizer and activations, in 1e9 bytes; "
        "null: 90 % of an accelerator's memory, no limit on CPU.",
    )

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value.startswith("type:") and len(value) > len("type:"):
            return value
        if value not in ("parameters", "uniform", *MEASURED):
            raise ValueError('not a method; give "parameters", "uniform", "type:REGEX", "profile" or "adaptive"')
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Partition":
        given = [
            name for name in ("min_gain", "memory_gb") if getattr(self, name) != type(self).model_fields[name].default
        ]
        if given and not self.measured:
            raise ValueError(
                f'{", ".join(given)} has no meaning with method "{self.method}"; choose "profile" or "adaptive"'
            )
        return self

    @property
    def measured(self) -> bool:
        """Whether layers move while the run goes on."""
        return self.method in MEASURED

    @property
    def first_method(self) -> str:
        """How the layers are cut before anything has been measured."""
        return "parameters" if self.measured else self.method
