"""recommend(history, k) on an exported folder, in one process."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
import torch
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

from ds_recsys.errors import UserError
from ds_recsys.metrics import top_k


@dataclass(frozen=True)
class Recommendation:
    """One item: its id as in the log, its title where the log had one, its score (a logit)."""

    item: str
    title: str | None
    score: float


class Recommender:
    """An exported model and its catalogue.

    recommender = Recommender.from_pretrained("runs/quickstart/export")
    recommender.recommend(["50", "181", "172"], k=5)
    """

    def __init__(self, model, items: list[str], titles: list[str] | None, max_length: int):
        self.model, self.items, self.titles, self.max_length = model.eval(), items, titles, max_length
        self._index = {item: index for index, item in enumerate(items, start=1)}

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | None = None) -> "Recommender":
        """Load what `launch/export.py` or `Trainer.export` wrote; on the GPU when there is one and `device` is None.

        Raises:
            UserError: `folder` is not an export.
        """
        folder = Path(folder)
        if not (folder / "items.parquet").exists():
            raise UserError(
                f"{folder}: no items.parquet, so not an exported recommender; write one with launch/export.py"
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(folder).to(device)
        if model.config.recsys.get("cosine_scale"):
            _score_by_cosine(model, model.config.recsys["cosine_scale"])
        catalogue = pyarrow.parquet.read_table(folder / "items.parquet").to_pydict()
        items = [str(item) for item in catalogue["id"]]
        return cls(model, items, catalogue.get("title"), model.config.recsys["max_length"])

    def recommend(self, history: Sequence, k: int = 10, *, exclude_history: bool = True) -> list[Recommendation]:
        """The `k` best next items after `history` (item ids as in the log, oldest first).

        Raises:
            UserError: the history is empty or names items that are not in the catalogue.
        """
        unknown = [str(item) for item in history if str(item) not in self._index]
        if unknown or not len(history):
            what = f"items not in the catalogue: {', '.join(unknown[:5])}" if unknown else "the history is empty"
            raise UserError(f"recommend: {what}; give ids as in the log, such as {', '.join(self.items[:3])}")
        indices = torch.tensor([self._index[str(item)] for item in history])
        scores = self._scores(indices)
        seen = (torch.zeros_like(indices), indices) if exclude_history else None
        best = top_k(scores, min(k, len(self.items)), seen)[0].tolist()
        return [self._recommendation(index, scores[0, index].item()) for index in best if index]

    @torch.inference_mode()
    def _scores(self, indices: torch.Tensor) -> torch.Tensor:
        inputs = indices[-self.max_length :].unsqueeze(0).to(self.model.device)
        return self.model(input_ids=inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float().cpu()

    def _recommendation(self, index: int, score: float) -> Recommendation:
        return Recommendation(self.items[index - 1], self.titles[index - 1] if self.titles else None, score)


@torch.no_grad()
def _score_by_cosine(model, scale: float) -> None:
    """Replace the head's dot product by `scale` times the cosine, as the model was trained."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(scale * normalize(head.weight, dim=-1))  # no longer tied to the embedding
    head.register_forward_pre_hook(lambda _, inputs: (normalize(inputs[0], dim=-1), *inputs[1:]))
