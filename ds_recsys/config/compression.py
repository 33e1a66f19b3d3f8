"""The "compression" block: how gradients travel on the data axis."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ds_recsys.config.base import Auto, Block, NonNegative, Positive


class Compression(Block):
    """How gradients are compressed on the data axis. Vectors, small tensors and LoRA's are always sent as they are."""

    method: Literal["none", "auto", "bf16", "int8", "int4", "sign", "topk", "randomk", "powersgd"] = Field(
        "none",
        description='What dense gradients are sent as; `"none"` leaves DeepSpeed alone, `"auto"` times fp32, int8 and int4 '
        "once on this run's links and takes the fastest.",
    )
    rotate: bool = Field(
        False, description="int4: a randomised Hadamard rotation of each block first, which spreads outliers out."
    )
    ratio: float = Field(0.01, gt=0, le=1, description="topk, randomk: share of the values that is sent.")
    values: Literal["fp32", "bf16", "int8"] = Field("fp32", description="topk: what the values that are sent become.")
    rank: Positive = Field(4, description="powersgd: rank of the approximation of each matrix.")
    error_feedback: bool = Field(
        True,
        description="Add what was not sent to the next step's gradient; takes two fp32 copies of the compressed gradients.",
    )
    momentum: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="topk, randomk: momentum correction, in place of an SGD's own momentum (Deep Gradient Compression).",
    )
    warmup_steps: NonNegative = Field(0, description="Optimizer steps before the method is in full force.")
    warmup: Literal["dense", "ratio"] = Field(
        "dense",
        description='Until then: `"dense"` sends fp32, `"ratio"` (topk, randomk) lowers the share from 25 % to `ratio`.',
    )
    min_elements: Positive = Field(4096, description="Tensors with fewer values are sent as they are.")
    overlap: bool = Field(
        True,
        description="Reduce a bucket of gradients while the backward pass computes the next; in stage 0 and pipelines, "
        "with bf16 unless `immediate_grad_update` is false.",
    )
    early_head: bool = Field(
        True,
        description="Sum what the head adds to the gradient of a tied item table first, while the backward pass goes on, and "
        "the rows that were looked up at its end, where these are few; with `overlap`, one stage, fp32 and stage 0.",
    )
    bucket_elements: Positive = Field(
        1_000_000,
        description="Least number of gradient values that are reduced at once; of those that come last, a quarter and a half.",
    )
    hierarchical: bool | Auto = Field(
        "auto",
        description='Sum among the ranks of a host before anything is sent to others; `"auto"` where hosts hold several.',
    )
    owner_shares: list[Annotated[float, Field(ge=0)]] | None = Field(
        None,
        description="A number per replica: in these proportions they sum the gradients for all. A replica sends and receives "
        "least where it sums nothing: 0 for one on a slow link. For three hosts or more; null is equal parts.",
    )
    checksum: bool = Field(False, description="Check a CRC-32 of everything that is received.")

    @model_validator(mode="after")
    def _options_fit_the_method(self) -> "Compression":
        for option, methods in _NEEDS.items():
            changed = getattr(self, option) != type(self).model_fields[option].default
            if changed and self.method not in methods:
                raise ValueError(f'"{option}" is for {" and ".join(methods)}, and "method" is "{self.method}"')
        if self.warmup == "ratio" and self.method not in _NEEDS["ratio"]:
            raise ValueError(f'"warmup": "ratio" is for topk and randomk, and "method" is "{self.method}"')
        if self.owner_shares is not None and not sum(self.owner_shares):
            raise ValueError('"owner_shares" leaves nobody to sum the gradients; give at least one replica a part')
        if self.momentum and not self.error_feedback:
            raise ValueError('"momentum" works on what error feedback keeps, and "error_feedback" is false')
        return self


_NEEDS = {
    "owner_shares": ("bf16", "int8", "int4", "sign", "topk", "randomk", "powersgd"),
    "rotate": ("int4",),
    "ratio": ("topk", "randomk"),
    "values": ("topk",),
    "rank": ("powersgd",),
    "momentum": ("topk", "randomk"),
}
