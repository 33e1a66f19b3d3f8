"""Next-item loss: cross-entropy over the catalogue at every supervised position, averaged over the global batch."""

import torch
import torch.nn.functional as F

IGNORE = -100  # label of a position that is not supervised, as in torch's cross_entropy


class NextItemLoss:
    """`loss_fn` of the pipeline: called on the last stage with the hidden states and the labels of one micro-batch.

    DeepSpeed averages over micro-batches and data ranks. A mean of per-micro-batch means weighs a position by how
    short its micro-batch is, so each micro-batch's sum of losses is multiplied by
    `scale = micro_batches * data_size / positions in the global batch`: the average is then the global mean.

    Logits are computed for supervised positions only: padding costs no head work.
    """

    def __init__(self, pipe, label_smoothing: float = 0.0):
        self.pipe = pipe
        self.label_smoothing = label_smoothing

    def __call__(self, hidden: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """hidden [B, S, H]; labels = (item indices int64 [B, S] with -100 to ignore, scale 0-d) -> loss 0-d, fp32."""
        targets, scale = labels
        supervised = targets != IGNORE
        logits = self.pipe.logits(hidden[supervised]).float()
        loss = F.cross_entropy(logits, targets[supervised], reduction="sum", label_smoothing=self.label_smoothing)
        return loss * scale.to(loss.dtype)
