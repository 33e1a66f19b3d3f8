"""Sharing layers out among tensor ranks, without any process group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensor_zoo import skeleton_of

from ds_recsys.errors import UserError
from ds_recsys.models.tensor import plan_block
from ds_recsys.models.tensor.families import OWN_PLANS, UNSHARDED
from ds_recsys.models.tensor.fused import fused_shard
from ds_recsys.models.tensor.split import even, share_heads


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 12))
def test_every_head_has_one_rank_and_its_own_key_value_head(kv_heads, group, size):
    heads = kv_heads * group
    if size > heads:
        with pytest.raises(UserError, match=f"tensor {size} is more than"):
            share_heads(heads, kv_heads, size)
        return
    split = share_heads(heads, kv_heads, size)
    computed = [h for start, stop in split.query.bounds for h in range(start, stop)]
    assert computed == list(range(heads))
    for rank in range(size):
        first, last = split.kv.bounds[rank]
        mine = list(range(*split.query.bounds[rank]))
        assert split.groups(rank) * split.kv.held(rank) == len(mine)
        # HF's attention repeats each key-value head for `groups` query heads in a row
        assert [first + i // split.groups(rank) for i in range(len(mine))] == [h // group for h in mine]
        assert last <= kv_heads
    if kv_heads >= size:
        assert not split.duplicated
        assert max(split.kv.held(r) for r in range(size)) - min(split.kv.held(r) for r in range(size)) <= 1


def test_fewer_key_value_heads_than_ranks():
    split = share_heads(9, 3, 4)
    assert split.kv.bounds == ((0, 1), (0, 1), (1, 2), (2, 3))
    assert split.query.bounds == ((0, 2), (2, 3), (3, 6), (6, 9))


@given(st.integers(1, 200), st.integers(1, 8), st.sampled_from([1, 8]))
def test_features_are_shared_out_evenly(count, size, unit):
    if count < size:
        with pytest.raises(UserError):
            even(count, size, "features", unit)
        return
    split = even(count, size, "features", unit)
    assert [f for start, stop in split.bounds for f in range(start, stop)] == list(range(count))
    held = [split.held(rank) for rank in range(size)]
    assert min(held) >= 1 and max(held) - min(held) <= unit


@pytest.mark.parametrize("layout", ["qkv_parts", "qkv_grouped"])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 2), (4, 2, 2), (9, 3, 2), (6, 1, 4), (4, 2, 3)])
def test_fused_projections_are_cut_by_heads(layout, heads, kv_heads, size):
    """Rows are named by what they are, and each rank must find its heads in the order HF's code reads them."""
    width, group = 2, heads // kv_heads
    queries = [f"q{h}" for h in range(heads)]
    if layout == "qkv_parts":
        names = queries + [f"k{h}" for h in range(kv_heads)] + [f"v{h}" for h in range(kv_heads)]
    else:
        names = [n for h in range(kv_heads) for n in (*queries[h * group : (h + 1) * group], f"k{h}", f"v{h}")]
    split = share_heads(heads, kv_heads, size)
    shard = fused_shard(layout, split, len(names) * width, "qkv")
    rows = torch.arange(len(names) * width)
    for rank in range(size):
        mine = [names[row // width] for row in shard.take(rows, rank).tolist()[::width]]
        q, kv = range(*split.query.bounds[rank]), range(*split.kv.bounds[rank])
        if layout == "qkv_parts":
            want = [f"q{h}" for h in q] + [f"k{h}" for h in kv] + [f"v{h}" for h in kv]
        else:
            want = [n for h in kv for n in (*(f"q{i}" for i in q if i // group == h), f"k{h}", f"v{h}")]
        assert mine == want


def test_smollm2_heads_are_shared_out_in_whole_groups():
    skeleton = skeleton_of("llama", hidden_size=72, num_attention_heads=9, num_key_value_heads=3, head_dim=8)
    plan = plan_block(skeleton, 0, 2)
    block = skeleton.blocks[0]
    shapes = {name: plan.shards[name].shape(p.shape, 0) for name, p in block.named_parameters() if name in plan.shards}
    assert shapes["self_attn.q_proj.weight"] == (48, 72) and shapes["self_attn.k_proj.weight"] == (16, 72)
    assert shapes["self_attn.o_proj.weight"] == (72, 48) and shapes["mlp.down_proj.weight"] == (72, 32)
    assert "input_layernorm.weight" not in plan.shards


def test_one_rank_needs_no_plan():
    assert plan_block(skeleton_of("mamba"), 0, 1).shards == {}


@pytest.mark.parametrize("model_type", sorted(UNSHARDED))
def test_types_left_out_are_refused_by_name_and_reason(model_type):
    with pytest.raises(UserError) as refused:
        plan_block(skeleton_of(model_type), 0, 2)
    assert repr(model_type) in str(refused.value) and UNSHARDED[model_type] in str(refused.value)
    assert "set tensor to 1" in str(refused.value)


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match="tensor 5 is more than the 4 query heads"):
        plan_block(skeleton_of("llama"), 0, 5)
    with pytest.raises(UserError, match=r"q_layernorm\.norms\.0\.weight"):  # a norm per head, in a list
        plan_block(skeleton_of("stablelm", qk_layernorm=True), 0, 2)
    skeleton = skeleton_of("llama")
    skeleton.config.base_model_tp_plan = {"layers.*.mlp.up_proj": "diagonal"}
    with pytest.raises(UserError, match=r"'llama' wants style 'diagonal' for 'mlp.up_proj'"):
        plan_block(skeleton, 0, 2)
    skeleton.config.base_model_tp_plan = {"layers.*.mixer.in_proj": "colwise"}
    with pytest.raises(UserError, match="plan of model type 'llama' fits none of its layers"):
        plan_block(skeleton, 0, 2)
    skeleton.config.base_model_tp_plan = None
    with pytest.raises(UserError, match="'llama' has no tensor-parallel plan"):
        plan_block(skeleton, 0, 2)


def test_a_parameter_that_no_plan_knows_is_refused():
    skeleton = skeleton_of("llama")
    skeleton.blocks[1].self_attn.q_norm = torch.nn.LayerNorm(32, device="meta")  # over all heads, as in OLMo 2
    with pytest.raises(UserError, match=r"no plan says what becomes of parameter 'self_attn.q_norm.weight'"):
        plan_block(skeleton, 1, 2)
    skeleton.blocks[0].self_attn.gate = torch.nn.Parameter(torch.empty(32, device="meta"))
    with pytest.raises(UserError, match=r"no plan says what becomes of parameter 'self_attn.gate'"):
        plan_block(skeleton, 0, 2)


def test_own_plans_name_things_that_exist():
    for model_type in sorted(OWN_PLANS.keys() - {"phi4_multimodal"}):
        skeleton = skeleton_of(model_type)
        names = {n for block in skeleton.blocks for n, _ in [*block.named_modules(), *block.named_parameters()]}
        assert any(name in names for name in OWN_PLANS[model_type]), model_type
        assert any(plan_block(skeleton, i, 2).shards for i in range(len(skeleton.blocks)))
