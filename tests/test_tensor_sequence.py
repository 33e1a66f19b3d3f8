"""Layers whose hidden states are split along the sequence between the regions: parity, dropout, memory."""

import warnings

import pytest
import torch
import transformers
from deepspeed.runtime.activation_checkpointing import checkpointing
from distributed import distributed, run_on_grid
from model_zoo import tiny_config
from tensor_zoo import compare, cut, gathered, random_block, skeleton_of, tensor_axis
from torch.utils.checkpoint import checkpoint

from ds_recsys.errors import UserError
from ds_recsys.models import ModelBuilder, recommender_config
from ds_recsys.models.tensor import plan_block
from ds_recsys.topology import TensorAxis

CASES = [
    ("llama", {}),
    ("llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}),
    ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "intermediate_size": 65}),
    ("qwen2", {}),
    ("qwen3", {"num_key_value_heads": 1}),
    ("mistral", {}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("gemma4_text", {}),
    ("cohere", {"use_qk_norm": True}),
    ("apertus", {}),
    ("phi", {}),
    ("phi3", {"num_key_value_heads": 1}),
    ("gpt_neox", {"use_parallel_residual": True}),
    ("glm", {}),
    ("gpt2", {}),
    ("bloom", {}),
    ("falcon", {"alibi": True}),
    ("gptj", {}),
    ("bert", {}),
]


def check_cases():
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    for model_type, changes in CASES:
        skeleton = skeleton_of(model_type, **changes)
        try:
            for index in range(2):
                compare(skeleton, index, length=12, sequence_parallel=True)
        except AssertionError as error:
            raise AssertionError(f"{model_type} {changes}: {error}") from error


@pytest.mark.parametrize("world", [2, 3])
def test_a_split_sequence_changes_nothing(world):
    run_on_grid(check_cases, world)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mixtral", "'mlp.experts' has style 'moe_tp_experts'"),
        ("deepseek_v2", "has style 'mla_kv_a_proj'"),
        ("olmo2", "has style 'colwise_gather_output'"),
        ("codegen", "its attention is not cut"),
        ("opt", "region 'of the layer itself' has no module of its own"),
        ("falcon_h1", r"'mamba.* may look at several positions"),
    ],
)
def test_what_looks_at_several_positions_is_refused(model_type, reason):
    with pytest.raises(UserError, match=f"no sequence parallelism here, since .*{reason}.*sequence_parallel to false"):
        plan_block(skeleton_of(model_type), 0, 2, sequence_parallel=True)


@distributed(tensor=2)
def test_a_norm_read_twice_is_gathered_once():
    """Attention and feed-forward of GPT-NeoX read a norm each, those of Phi the same one."""
    counts = []
    original = torch.distributed.all_gather
    torch.distributed.all_gather = lambda *args, **kwargs: (counts.append(1), original(*args, **kwargs))[1]
    try:
        for model_type in ("gpt_neox", "phi"):
            skeleton = skeleton_of(model_type)
            part = cut(random_block(skeleton, 0), plan_block(skeleton, 0, 2, sequence_parallel=True), tensor_axis())
            hidden = torch.randn(2, 12, 32)
            skeleton.arguments(hidden, True)[0].apply(part, hidden[:, :6])
    finally:
        torch.distributed.all_gather = original
    assert len(counts) == 2 + 1


def run_dropping(recompute, masks):
    """One GPT-2 layer with dropout inside and outside the regions -> output, gradients, the generator's state.

    What the last dropout leaves out goes to `masks`.
    """
    skeleton = skeleton_of("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    axis = tensor_axis()
    part = cut(random_block(skeleton, 0), plan_block(skeleton, 0, 2, sequence_parallel=True), axis).train()
    part.mlp.dropout.register_forward_hook(lambda module, args, out: masks.append(out.detach() == 0))
    hidden = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
    call = skeleton.arguments(hidden, True)[0]
    piece = hidden.chunk(2, 1)[axis.rank].clone().requires_grad_()
    torch.manual_seed(5)
    out = recompute(lambda h: call.apply(part, h), piece)
    state = torch.get_rng_state()
    torch.rand(100)
    out.sum().backward()
    return out.detach(), piece.grad, state, {n: p.grad for n, p in part.named_parameters() if p.grad is not None}


@distributed(tensor=2)
def test_dropout_of_a_split_sequence():
    masks = []
    out, grad, state, grads = run_dropping(lambda forward, hidden: forward(hidden), masks)
    (first, state_0), (second, state_1) = gathered((masks[0], state))
    assert torch.equal(state_0, state_1), "the common generators ran apart"
    assert not torch.equal(first, second), "the ranks' positions are dropped alike"
    for recompute in (
        lambda forward, hidden: checkpoint(forward, hidden, use_reentrant=False),
        checkpointing.checkpoint,
    ):
        again = run_dropping(recompute, masks)
        assert torch.equal(again[0], out) and torch.equal(again[1], grad)
        assert all(torch.equal(again[3][name], value) for name, value in grads.items())
    assert torch.equal(*gathered(grads["ln_1.weight"]))


def saved_bytes(part, call, hidden):
    """Memory of everything that one forward keeps for its backward, parameters aside."""
    known = {p.untyped_storage().data_ptr() for p in part.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call.apply(part, hidden)
    return sum(size for size, _ in kept.values())


def measure(model_type, length, **changes):
    skeleton = skeleton_of(model_type, **changes)
    axis = tensor_axis()
    whole = random_block(skeleton, 0)
    hidden = torch.randn(2, length, skeleton.config.hidden_size).requires_grad_()
    call = skeleton.arguments(hidden, True)[0]
    sizes = [saved_bytes(whole.train(), call, hidden)]
    for sequence in (False, True):
        part = cut(whole, plan_block(skeleton, 0, axis.size, sequence), axis).train()
        piece = hidden.detach().chunk(axis.size, 1)[axis.rank].clone().requires_grad_() if sequence else hidden
        sizes.append(saved_bytes(part, call, piece))
    return sizes


def test_a_split_sequence_keeps_less():
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    for whole, cut_heads, cut_sequence in run_on_grid(measure, 2, model_type="llama", length=128, **sizes):
        print(f"saved for the backward, MB: whole {whole / 1e6:.2f}, tensor {cut_heads / 1e6:.2f}, "
              f"with the sequence split {cut_sequence / 1e6:.2f}")  # fmt: skip
        assert cut_sequence < 0.8 * cut_heads < 0.8 * whole


def test_what_lies_between_the_layers_is_refused():
    """The skeleton knows which models compute something there; on a split sequence it would be left out."""
    config = recommender_config(tiny_config("llama"), 49)
    builder = ModelBuilder(config, tensor=TensorAxis(None, 2, 0), sequence_parallel=True)
    assert builder.block_plan(1).sequence
    other = ModelBuilder(config, tensor=TensorAxis(None, 2, 0), sequence_parallel=True)
    other.skeleton.glue[1] = True
    with pytest.raises(UserError, match="between its layers"):
        other.block_plan(1)
