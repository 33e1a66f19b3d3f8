"""What each compressor sends, against the plainest way to say it."""

import numpy as np
import pytest
import torch
from test_comm_compressors import ENGINES, MAX, encode, using

from ds_recsys.comm.compressors import compressor
from ds_recsys.comm.compressors.rotation import rotate, rotate_back

every_engine = pytest.mark.parametrize("engine", ENGINES)


def sent(method, x, seed=0):
    return method.decompress(method.compress(x, seed), x.numel(), seed)


@every_engine
@pytest.mark.parametrize("name, levels", [("int8", 127), ("int4", 7)])
def test_quantisers_round_half_to_even_against_a_plain_formula(name, levels, engine):
    x = torch.randn(256 * 9 + 101, generator=torch.Generator().manual_seed(1))
    x[256:512] = torch.arange(256) % (2 * levels + 1) / 2 * 2.0**-7  # halves of the scale, that are exact
    x[300] = levels * 2.0**-7
    with using(engine):
        found = sent(compressor(name), x)
    for start in range(0, x.numel(), 256):
        block = x[start : start + 256].numpy().astype(np.float64)
        scale = np.abs(block).max() / levels
        np.testing.assert_allclose(found[start : start + 256], np.rint(block / scale) * scale, rtol=1e-6)
    assert found[256 + 1] == 0 and found[256 + 3] == 2 * 2.0**-7  # 0.5 and 1.5


@every_engine
def test_quantisers_send_tiny_blocks_as_zero_and_keep_them(engine):
    for options in ({}, {"rotate": True}):
        for method in (compressor("int8", **options), compressor("int4", **options), compressor("sign")):
            x = torch.randn(3 * 1024)
            x[1024:2048] = 2.0**-126  # sixteen times as much in a rotated block
            with using(engine):
                _, payload, error = encode(method, x)
                found = method.decompress(payload, x.numel())
            assert not found[1024:2048].any() and torch.equal(error[1024:2048], x[1024:2048])
            assert found[:1024].any() and found[2048:].any()
    with using(engine):
        assert torch.equal(sent(compressor("int8"), torch.full((5,), 2.0**-120)), torch.full((5,), 2.0**-120))


@every_engine
@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "sign", "topk"])
def test_the_largest_numbers_do_not_become_infinite(name, engine):
    x = torch.full((3000,), MAX)
    x[::2] *= -1
    with using(engine):
        finite, payload, error = encode(compressor(name), x)
        assert finite and error.isfinite().all()
        assert compressor(name).decompress(payload, 3000).isfinite().all()


@every_engine
def test_bf16_is_torch_bfloat16(engine):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 5000)
    x[:3] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0])  # ties go to the even neighbour
    with using(engine):
        assert torch.equal(sent(compressor("bf16"), x), x.bfloat16().float())
        assert sent(compressor("bf16"), torch.tensor([2.0**-133, 2.0**-130 * 1.3])).tolist() == [
            2.0**-133,
            10 * 2.0**-133,
        ]


@every_engine
@pytest.mark.parametrize("length", [1, 7, 600, 1023, 1024])
def test_sign_sends_the_mean_magnitude(length, engine):
    x = torch.randn(length, generator=torch.Generator().manual_seed(length))
    with using(engine):
        found = sent(compressor("sign"), x)
    torch.testing.assert_close(found, x.sign() * x.abs().double().mean().float(), rtol=1e-6, atol=0)


@every_engine
@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.5, 1])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "wide"])
def test_top_k_is_what_a_stable_sort_picks(ratio, kind, engine):
    x = torch.randn(2 * 16384 + 3001, generator=torch.Generator().manual_seed(5))
    if kind == "ties":
        x = (2 * x).round()
    if kind == "zeros":
        x = x * (torch.arange(len(x)) % 500 == 0)
    if kind == "wide":
        x = x * torch.exp2(torch.randint(-140, 100, x.shape, generator=torch.Generator().manual_seed(6)).float())
    method = compressor("topk", ratio=ratio)
    with using(engine):
        payload = method.compress(x)
        found = method.decompress(payload, len(x))
    for start in range(0, len(x), 16384):
        block = x[start : start + 16384]
        k = method.kept(len(block))
        chosen = np.sort(np.argsort(-block.abs().numpy(), kind="stable")[:k])
        row = payload[method.wire_bytes(start) :][: 6 * k].numpy()
        assert (row[4 * k :].view(np.uint16) == chosen).all()
        expected = torch.zeros_like(block)
        expected[chosen] = block[chosen]
        assert torch.equal(found[start : start + 16384], expected)


@every_engine
@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_top_k_values_are_those_of_the_compressor_of_that_name(values, engine):
    x = torch.randn(200, generator=torch.Generator().manual_seed(8))
    with using(engine):
        exact = sent(compressor("topk", ratio=0.2), x)
        found = sent(compressor("topk", ratio=0.2, values=values), x)
        assert torch.equal(found[exact != 0], sent(compressor(values), exact[exact != 0]))
        assert not found[exact == 0].any()


def test_a_damaged_position_writes_nowhere_else():
    method = compressor("topk", ratio=0.5)
    payload = method.compress(torch.ones(8))
    payload[-2:] = 255
    memory = torch.zeros(1 << 17)
    with using("c"):
        method.decode(payload, memory[:8])
    assert memory.sum() == 3


@every_engine
def test_random_k_sends_other_places_for_other_seeds_and_blocks(engine):
    method, x = compressor("randomk", ratio=0.05), torch.ones(2 * 16384)
    with using(engine):
        rows = [row for seed in (0, 9) for row in sent(method, x, seed).view(2, -1)]
        places = {tuple(row.nonzero().flatten().tolist()) for row in rows}
        assert len(places) == 4
        assert torch.equal(sent(method, x, -1), sent(method, x, 2**64 - 1))


def test_rotation_is_orthogonal_and_its_own_way_back():
    codes = torch.randint(-127, 128, (5, 256), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale = torch.rand(5, 1) + 0.5
    torch.testing.assert_close(rotate(rotate_back(codes, scale)), codes * scale, rtol=0, atol=1e-4)
    matrix = rotate(torch.eye(256)).double()
    assert torch.equal(matrix.abs(), torch.full((256, 256), 1 / 16, dtype=torch.double))
    assert torch.equal(matrix @ matrix.T, torch.eye(256, dtype=torch.double))


@every_engine
def test_rotation_spreads_outliers_over_whole_blocks_and_leaves_the_short_one(engine):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256 * 20 + 100, generator=generator)
    x[::256] *= 30
    with using(engine):
        plain, rotated = sent(compressor("int4"), x), sent(compressor("int4", rotate=True), x)
    whole = x[: 256 * 20]
    assert (rotated[: 256 * 20] - whole).norm() < 0.5 * (plain[: 256 * 20] - whole).norm()
    assert torch.equal(plain[256 * 20 :], rotated[256 * 20 :])


@every_engine
def test_rotation_refuses_what_could_overflow(engine):
    method = compressor("int4", rotate=True)
    x = torch.ones(256)
    with using(engine):
        assert encode(method, x * 2.0**113)[0]
        finite, payload, _ = encode(method, torch.eye(1, 256)[0] * 2.0**122)
        assert not finite and method.decompress(payload, 256).isnan().all()
        assert encode(method, torch.full((255,), MAX))[0]  # a short block is not rotated


def test_mistakes_are_named():
    with pytest.raises(ValueError, match='method "int3" is none of bf16, int8'):
        compressor("int3")
    with pytest.raises(ValueError, match="method int8 has no option ratio"):
        compressor("int8", ratio=0.1)
    with pytest.raises(ValueError, match="ratio 0 is not above 0"):
        compressor("topk", ratio=0)
    with pytest.raises(ValueError, match="ratio 1.5 is not"):
        compressor("randomk", ratio=1.5)
    with pytest.raises(ValueError, match='values "fp8" is none of fp32'):
        compressor("topk", values="fp8")
    with pytest.raises(AssertionError, match="the payload of 8 values is 12"):
        compressor("int8").decode(torch.zeros(11, dtype=torch.uint8), torch.zeros(8))
