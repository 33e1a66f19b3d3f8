"""Names of transformers that are not public, gathered here; tests/test_models_private.py says which one moved."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CAUSAL_LM_CLASSES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@dataclass
class Piece:
    """How one or several parameters come out of stored tensors: read as they are, or through transformers'
    operations.
    """

    target: str
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)  # (stored name, pattern it matched)
    wanted: str = ""

    def load(self, read: Callable[[str], Tensor]) -> Tensor:
        """Read the sources and convert them into the tensor of parameter `wanted`."""
        if self.converter is None:
            return read(self.sources[0][0])
        converter = deepcopy(self.converter)
        for stored, pattern in self.sources:
            converter.add_tensor(self.target, stored, pattern, read(stored))
        made = converter.convert(self.target, model=None, config=None)
        value = made[self.wanted]
        return value[0] if isinstance(value, list) else value


def conversion_plan(model: PreTrainedModel, stored: list[str]) -> dict[str, Piece]:
    """Parameter or buffer name of `model` -> the piece that makes it out of the checkpoint's names `stored`."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known = model.state_dict()
    pieces: dict[str, Piece] = {}
    for name in sorted(stored, key=dot_natural_key):
        prefix = model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=known)
        if target not in known:
            continue
        piece = pieces.setdefault(target, Piece(target, by_pattern[pattern] if pattern else None, wanted=target))
        piece.sources.append((name, pattern or name))
    for target, piece in list(pieces.items()):
        if piece.converter is None:
            continue
        # One operation may make several parameters (a fused qkv split in three): each is found under its own name.
        patterns = piece.converter.target_patterns
        for other in patterns[1:]:
            sibling = target.replace(patterns[0], other)
            if sibling != target:
                pieces.setdefault(sibling, Piece(target, piece.converter, piece.sources, wanted=sibling))
    return pieces
