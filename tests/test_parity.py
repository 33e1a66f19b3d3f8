"""Every grid gives what one plain Hugging Face process gives: logits, loss, every gradient, 20 steps of training.

DS_RECSYS_FULL_GRID=1 runs every combination of grid, ZeRO stage and tied or untied table.
"""

import pytest
import torch
import torch.nn.functional as F
from bench_runs import whole_grid
from distributed import run_on_grid
from transformers import AutoConfig, AutoModelForCausalLM

from ds_recsys import compat
from ds_recsys.engine import pipeline_engine
from ds_recsys.models import RecommenderPipe, recommender_config
from ds_recsys.objective import IGNORE, NextItemLoss
from ds_recsys.topology import Grid

_GLOBAL_BATCH, _LENGTH, _ITEMS, _SEED = 16, 12, 50, 3
_ADAM = {"type": "AdamW", "params": {"lr": 2e-3, "weight_decay": 0.0, "torch_adam": True}}
_SGD = {"type": "SGD", "params": {"lr": 1.0}}  # one step of it moves each weight by exactly its gradient


def _model_config(tie, key_value_heads=2):
    base = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        initializer_range=0.1,  # at 0.02 some gradients are mere rounding noise, which Adam blows up to full steps
    )
    return recommender_config(base, _ITEMS, tie=tie)


def _global_batch(step):
    """(input_ids, labels) [16, 12]: histories of unequal length, right-padded, so that micro-batch means would be biased."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, _ITEMS + 1, (_GLOBAL_BATCH, _LENGTH + 1), generator=generator)
    lengths = torch.randint(2, _LENGTH + 1, (_GLOBAL_BATCH, 1), generator=generator)
    padding = torch.arange(_LENGTH) >= lengths
    return ids[:, :-1].masked_fill(padding, 0), ids[:, 1:].masked_fill(padding, IGNORE)


def _train(grid, stage, tie, optimizer, steps, clip=0.0, dtype="fp32", recompute=0, key_value_heads=2):
    """Losses and the final parameters of this stage, by Hugging Face name; first of all the logits of batch 0."""
    pipe = RecommenderPipe(
        _model_config(tie, key_value_heads), grid.deepspeed(), seed=_SEED, activation_checkpoint_interval=recompute
    )
    pipe.loss_fn = NextItemLoss(pipe)
    micro = 2
    config = {
        "train_batch_size": _GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": micro,
        "optimizer": optimizer,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000,
        **({"bf16": {"enabled": True}} if dtype == "bf16" else {}),
    }
    engine = pipeline_engine(pipe, config)
    rank, rows = engine.grid.get_data_parallel_rank(), micro * engine.micro_batches
    mine = slice(rank * rows, (rank + 1) * rows)

    def micro_batches(step):
        ids, labels = _global_batch(step)
        scale = torch.tensor(engine.micro_batches * grid.data / (labels != IGNORE).sum().item(), dtype=torch.float64)
        return [(i, (t, scale)) for i, t in zip(ids[mine].split(micro), labels[mine].split(micro), strict=True)]

    hidden = compat.forward_only(engine, micro_batches(0), engine.micro_batches)
    logits = None
    if engine.is_last_stage():
        with torch.no_grad():
            logits = pipe.logits(torch.cat(list(hidden))).float()
    before = {name: parameter.detach().clone() for name, parameter in pipe.hf_named_parameters()}
    losses = [engine.train_batch(iter(micro_batches(step))).item() for step in range(steps)]
    after = {name: parameter.detach().clone() for name, parameter in pipe.hf_named_parameters()}
    return {
        "place": (rank, pipe.builder.tensor.rank),
        "logits": logits,
        "losses": losses,
        "before": before,
        "after": after,
        "shards": pipe.builder.shards(),
    }


def _train_three_times(grid, stage, tie):
    """One step for the gradients; 20 clipped steps of SGD, for Adam does not notice a wrong norm; 20 of Adam."""
    return (
        _train(grid, stage, tie, _SGD, steps=1),
        _train(grid, stage, tie, _SGD, steps=20, clip=0.1),
        _train(grid, stage, tie, _ADAM, steps=20),
    )


def _reference(tie, steps, optimizer, start, clip=None, key_value_heads=2):
    """One plain Hugging Face model and torch optimizer on the whole global batch."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(_model_config(tie, key_value_heads))
    missing, unexpected = model.load_state_dict(start, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if tie else set())
    model.eval()
    logits = model(_global_batch(0)[0]).logits.detach()
    trainer = optimizer(model.parameters())
    losses, gradients = [], None
    for step in range(steps):
        ids, labels = _global_batch(step)
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        if gradients is None:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        trainer.step()
        trainer.zero_grad()
        losses.append(loss.item())
    return {"logits": logits, "losses": losses, "gradients": gradients}


def _gather(results, key):
    """HF name -> whole tensor; what all ranks of a tensor group hold must be the same bits, and so must replicas."""
    held: dict[str, dict[int, torch.Tensor]] = {}
    for result in results:
        for name, value in result[key].items():
            part = result["place"][1] if name in result["shards"] else 0
            kept = held.setdefault(name, {}).setdefault(part, value)
            assert torch.equal(kept, value), f"{name} differs between ranks that hold the same"
    shards = results[0]["shards"]
    return {
        name: shards[name].merge([parts[rank] for rank in sorted(parts)]) if name in shards else parts[0]
        for name, parts in held.items()
    }


def _gather_logits(results):
    """[global batch, S, I + 1] from the last stages: data ranks hold rows, tensor ranks columns."""
    rows: dict[int, list[torch.Tensor]] = {}
    for result in sorted(results, key=lambda r: r["place"]):
        if result["logits"] is not None:
            rows.setdefault(result["place"][0], []).append(result["logits"])
    return torch.cat([torch.cat(columns, -1) for columns in rows.values()])


_GRIDS = [Grid(pipe, data, tensor) for pipe in (1, 2) for data in (1, 2) for tensor in (1, 2)]


# each grid has both stages and both kinds of table by default, in half of their combinations
_CASES = [
    pytest.param(
        grid, stage, tie, id=f"{grid}-{stage}-{'tied' if tie else 'untied'}", marks=whole_grid if odd % 2 else ()
    )
    for number, grid in enumerate(_GRIDS)
    for stage in (0, 1)
    for tie in (True, False)
    for odd in [number + stage + tie]
]


@pytest.mark.parametrize("grid, stage, tie", _CASES)
def test_fp32_equals_one_plain_process(grid, stage, tie):
    results = run_on_grid(_train_three_times, grid.world_size, timeout=240, grid=grid, stage=stage, tie=tie)
    once, clipped, adam = zip(*results, strict=True)
    start, moved = _gather(once, "before"), _gather(once, "after")
    reference = _reference(tie, 1, lambda p: torch.optim.SGD(p, lr=1.0), start)
    torch.testing.assert_close(_gather_logits(once), reference["logits"], atol=1e-5, rtol=0)
    assert once[0]["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert set(reference["gradients"]) <= set(start)
    for name, gradient in reference["gradients"].items():
        torch.testing.assert_close(
            start[name] - moved[name], gradient, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )

    reference = _reference(tie, 20, lambda p: torch.optim.SGD(p, lr=1.0), start, clip=0.1)
    assert clipped[0]["losses"] == pytest.approx(reference["losses"], abs=1e-4)
    reference = _reference(tie, 20, lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.0), start)
    assert adam[0]["losses"] == pytest.approx(reference["losses"], abs=1e-4)


@pytest.mark.parametrize("stage", [0, 1])
def test_heads_that_ranks_share_count_once_in_the_norm(stage):
    """One key-value head on two tensor ranks, which both hold it: 20 clipped steps of SGD."""
    options = {"tie": True, "steps": 20, "clip": 0.1, "key_value_heads": 1}
    results = run_on_grid(_train, 4, grid=Grid(2, 1, 2), stage=stage, optimizer=_SGD, **options)
    start = _gather(results, "before")
    reference = _reference(optimizer=lambda p: torch.optim.SGD(p, lr=1.0), start=start, **options)
    assert results[0]["losses"] == pytest.approx(reference["losses"], abs=1e-4)


@pytest.mark.parametrize("stage", [0, 1])
def test_what_ranks_hold_in_common_stays_the_same_bits(stage):
    """50 steps on pipe 1 x data 2 x tensor 2, with shards of unequal size; `_gather` compares the copies."""
    grid = Grid(1, 2, 2)
    results = run_on_grid(_train, 4, grid=grid, stage=stage, tie=True, optimizer=_ADAM, steps=50, clip=0.1)
    whole, common = _gather(results, "after"), results[0]["after"].keys() - results[0]["shards"].keys()
    assert common and not any(torch.equal(whole[name], _gather(results, "before")[name]) for name in common)


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 2), Grid(1, 2, 2)], ids=str)
def test_bf16_stays_close(grid):
    """bf16 has 8 bits of mantissa (relative error 2^-8 = 0.4 %): the losses stay within 1 % of fp32 over 20 steps."""
    results = run_on_grid(
        _train, grid.world_size, grid=grid, stage=1, tie=True, optimizer=_ADAM, steps=20, dtype="bf16"
    )
    start = {name: value.float() for name, value in _gather(results, "before").items()}
    reference = _reference(True, 20, lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.0), start)
    assert results[0]["losses"] == pytest.approx(reference["losses"], rel=0.01)


@pytest.mark.parametrize("stage", [0, 1])
def test_bf16_gradients_of_a_tied_table_are_whole(stage):
    """One step of plain SGD moves the table as far as in fp32, whichever of DeepSpeed's bf16 optimizers runs."""
    sgd = {"type": "SGD", "params": {"lr": 4.0}}
    results = run_on_grid(_train, 2, grid=Grid(2), stage=stage, tie=True, optimizer=sgd, steps=1, dtype="bf16")
    start = {name: value.float() for name, value in _gather(results, "before").items()}
    reference = _reference(True, 1, lambda p: torch.optim.SGD(p, lr=4.0), start)
    name = "model.embed_tokens.weight"
    moved = _gather(results, "after")[name].float() - start[name]
    wanted = -4.0 * reference["gradients"][name]
    assert (moved - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("grid", [Grid(2), Grid(1, 1, 2)], ids=str)
def test_recomputation_changes_nothing(grid):
    plain, again = (
        run_on_grid(_train, 2, grid=grid, stage=0, tie=True, optimizer=_ADAM, steps=3, recompute=interval)
        for interval in (0, 1)
    )
    assert plain[0]["losses"] == again[0]["losses"]
    assert all(torch.equal(value, _gather(again, "after")[name]) for name, value in _gather(plain, "after").items())
