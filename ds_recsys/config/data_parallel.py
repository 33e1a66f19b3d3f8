"""The "data_parallel" block: when the replicas tell each other what they have learned."""

from typing import Literal

from pydantic import Field, model_validator

from ds_recsys.config.base import Block, NonNegative, Positive

LOCAL = ("local_sgd", "diloco", "async")  # modes in which the weights of the replicas differ for a while


class DataParallel(Block):
    """When the replicas on the data axis tell each other what they have learned."""

    mode: Literal["sync", "delayed", "local_sgd", "diloco", "async"] = Field(
        "sync",
        description="`sync`: gradients are averaged in every step, by DeepSpeed; `delayed`: their average is used one step "
        "later and travels meanwhile; `local_sgd`: replicas train alone and average their weights every `every` steps; "
        "`diloco`: the same, and an outer Nesterov optimizer takes the average change as its gradient; `async`: replicas "
        "train at their own speed and exchange their changes in the background.",
    )
    every: Positive = Field(50, description="local_sgd, diloco: steps that replicas train alone (H).")
    dense_until: NonNegative = Field(
        0, description="local_sgd, diloco: steps at the beginning in which gradients are averaged as in `sync`."
    )
    delay_correction: float = Field(
        0.0,
        ge=0,
        description="delayed: correct a late gradient g by this times g x g x (the change of the weights since), as in "
        "DC-ASGD; 0 does not.",
    )
    look_ahead: bool = Field(
        False,
        description="delayed: compute a step's gradients at the weights that the replica's own part of the average under way "
        "leads to, which undoes most of what a late average costs; it takes a second optimizer step, or of torch's "
        "AdamW on CPUs its weights alone, and two to four copies of the weights.",
    )
    outer_lr: float = Field(0.7, gt=0, description="diloco: learning rate of the outer optimizer.")
    outer_momentum: float = Field(0.9, ge=0, lt=1, description="diloco: its Nesterov momentum.")
    fragments: Positive = Field(
        1, description="diloco: parts of the weights, which take turns: one of them every `every` / `fragments` steps."
    )
    overlap_steps: NonNegative = Field(
        0, description="diloco: steps that go on while a part travels; its average is applied after them."
    )
    mixing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="diloco: share of a replica's own weights that stays when the outer optimizer's arrive.",
    )
    send_every: Positive = Field(
        16,
        description="async: steps of a replica between two of its messages to another one, at least; more take less of its "
        "time, fewer keep the weights of the others fresher.",
    )
    max_staleness: Positive = Field(
        100,
        description="async: a replica that falls behind what the others have seen of it by more steps rejoins them.",
    )
    on_lost: Literal["stop", "continue"] = Field(
        "stop", description="async, diloco: what the others do when a replica is lost; `continue` is for async."
    )

    @model_validator(mode="after")
    def _options_fit_the_mode(self) -> "DataParallel":
        for option, modes in _NEEDS.items():
            changed = getattr(self, option) != type(self).model_fields[option].default
            if changed and self.mode not in modes:
                raise ValueError(f'"{option}" is for {" and ".join(modes)}, and "mode" is "{self.mode}"')
        if self.look_ahead and self.delay_correction:
            raise ValueError('"look_ahead" leaves no delay to correct: use it or "delay_correction"')
        if self.mode == "diloco" and self.overlap_steps >= self.every:
            raise ValueError(
                f'"overlap_steps" {self.overlap_steps} must be less than "every" {self.every}: a part arrives before it '
                "leaves again; lower it"
            )
        if self.mode == "diloco" and self.fragments > self.every:
            raise ValueError(
                f'"fragments" {self.fragments} is more than "every" {self.every}, and one of them leaves in a step; lower it'
            )
        if self.mode == "async" and self.send_every >= self.max_staleness:
            raise ValueError(
                f'"send_every" {self.send_every} must be less than "max_staleness" {self.max_staleness}, or every replica '
                "falls behind all others; lower it"
            )
        if self.mode == "diloco" and self.on_lost == "continue":
            raise ValueError(
                '"on_lost": "continue" is for async: in diloco every replica takes part in every average; use "stop"'
            )
        return self

    @property
    def local(self) -> bool:
        """Whether the weights of the replicas differ for a while."""
        return self.mode in LOCAL


_NEEDS = {
    "every": ("local_sgd", "diloco"),
    "dense_until": ("local_sgd", "diloco"),
    "delay_correction": ("delayed",),
    "look_ahead": ("delayed",),
    "outer_lr": ("diloco",),
    "outer_momentum": ("diloco",),
    "fragments": ("diloco",),
    "overlap_steps": ("diloco",),
    "mixing": ("diloco",),
    "max_staleness": ("async",),
    "send_every": ("async",),
    "on_lost": ("async", "diloco"),
}
