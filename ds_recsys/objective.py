"""Next-item loss: cross-entropy over the catalogue at every supervised position, averaged over the global batch."""

import torch
from torch import Tensor

from ds_recsys.config.schema import Head
from ds_recsys.errors import UserError
from ds_recsys.head import split
from ds_recsys.head.linear_cross_entropy import linear_cross_entropy
from ds_recsys.head.negatives import InBatchNegatives, PopularityNegatives, UniformNegatives
from ds_recsys.head.sampled_softmax import gbce, sampled_cross_entropy
from ds_recsys.head.shard import IGNORE, HeadShard


class NextItemLoss:
    """`loss_fn` of the pipeline: called on the last stage with the hidden states and the labels of one micro-batch.

    DeepSpeed averages over micro-batches and data ranks. A mean of per-micro-batch means weighs a position by how
    short its micro-batch is, so each micro-batch's sum of losses is multiplied by
    `scale = micro_batches * data_size / positions in the global batch`: the average is then the global mean.

    Padding costs no head work, and scores exist one block of items at a time. On a tensor axis every rank gets the same
    loss and the same gradient of the hidden states.
    """

    def __init__(self, pipe, label_smoothing: float = 0.0, options: Head | None = None):
        self.pipe, self.label_smoothing = pipe, label_smoothing
        self.options = options or Head()

    def __call__(self, hidden: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
        """hidden [B, S, H]; labels = (item indices int64 [B, S] with -100 to ignore, scale 0-d) -> loss 0-d, fp32."""
        targets, scale = labels
        supervised = targets != IGNORE
        states = self.pipe.head_input(hidden[supervised])
        return self.sum(states, targets[supervised]) * scale.to(torch.float32)

    def sum(self, states: Tensor, targets: Tensor) -> Tensor:
        """states [N, H], targets int64 [N] -> sum of the losses of N positions."""
        dtype = self.options.compute_dtype
        return linear_cross_entropy(
            states,
            targets,
            self.pipe.head(),
            label_smoothing=self.label_smoothing,
            compute_dtype=dtype and getattr(torch, dtype),
            kernel=self.options.kernel,
        )


class SplitLoss(NextItemLoss):
    """The same from what the blocks of a split head have added up; smoothing and dtype are those of `pipe.split_head`."""

    def __call__(self, carried: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
        """carried [B, S, H + C] behind the last block; labels and loss as above."""
        targets, scale = labels
        if not torch.equal(split.targets_of(carried, self.pipe.split_head), targets):
            raise UserError(
                "stages were given different targets: give train_batch the same data on each rank of a pipeline"
            )
        losses = split.losses(carried, self.pipe.builder.num_rows, self.pipe.split_head)
        return losses.sum() * scale.to(torch.float32)


class SampledLoss(NextItemLoss):
    """The same over the target and sampled items: sampled softmax with logQ correction, or gSASRec's gBCE.

    The draw of a micro-batch is seeded from torch's generator, which `compat.seed_dropout` makes a function of (seed,
    data rank, step, micro-batch), so a resumed run draws what the unbroken one would have drawn.

    Args:
        options: the "head" block.
        counts: int64 [I + 1], how often each item occurs in training.
    """

    def __init__(self, pipe, options: Head, counts: Tensor):
        super().__init__(pipe, options=options)
        self.counts, self._sampler = counts, None

    def sum(self, states: Tensor, targets: Tensor) -> Tensor:
        head, options = self.pipe.head(), self.options
        if self._sampler is None:
            self._sampler = self._make_sampler(head)
        negatives = self._sampler(targets, int(torch.randint(2**62, ())))
        if options.loss == "sampled":
            return sampled_cross_entropy(states, targets, head, negatives, sparse=self.pipe.sparse_table)
        return gbce(
            states,
            targets,
            head,
            negatives,
            num_items=head.num_rows - 1,
            calibration=options.calibration,
            sparse=self.pipe.sparse_table,
        )

    def _make_sampler(self, head: HeadShard):
        options = self.options
        if options.sampling == "uniform":
            return UniformNegatives(head, min(options.negatives, head.num_rows - 1))
        if options.sampling == "popularity":
            return PopularityNegatives(head, options.negatives, self.counts, options.popularity_power)
        return InBatchNegatives(head, self.counts)


def next_item_loss(pipe, options: Head, label_smoothing: float, counts: Tensor) -> NextItemLoss:
    """The loss that the "head" block asks for; arguments as in the classes."""
    if pipe.split_head is not None:
        if options.loss != "full":
            raise UserError(f'loss "{options.loss}" does not work with a split head; use "full", or do not split it')
        return SplitLoss(pipe)
    if options.loss == "full":
        return NextItemLoss(pipe, label_smoothing, options)
    return SampledLoss(pipe, options, counts)
