"""Compressors, in C and in torch: what is sent plus what is kept is the gradient, in the bytes and bounds promised."""

import math
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recsys.comm.compressors import compressor
from ds_recsys.comm.compressors.dense import Float32
from ds_recsys.comm.kernels import native

COMPILED = native.library()
ENGINES = {"c": COMPILED, "torch": None}
METHODS = {
    "bf16": compressor("bf16"),
    "int8": compressor("int8"),
    "int4": compressor("int4"),
    "int8_rotated": compressor("int8", rotate=True),
    "int4_rotated": compressor("int4", rotate=True),
    "sign": compressor("sign"),
    "topk": compressor("topk", ratio=0.01),
    "topk_bf16": compressor("topk", ratio=0.3, values="bf16"),
    "topk_int8": compressor("topk", ratio=0.07, values="int8"),
    "topk_all": compressor("topk", ratio=1, values="int8"),
    "randomk": compressor("randomk", ratio=0.1),
}
SIZES = st.one_of(
    st.integers(1, 70),
    st.sampled_from([255, 256, 257, 511, 513, 1023, 1024, 1025, 2100, 16383, 16384, 16385, 17001, 33000, 70001]),
)
MAX = torch.finfo(torch.float32).max

every_method = pytest.mark.parametrize("method", METHODS)
every_engine = pytest.mark.parametrize("engine", ENGINES)


@contextmanager
def using(engine):
    if engine == "c" and COMPILED is None:
        pytest.skip("no C compiler here")
    with patch.object(native, "library", lambda: ENGINES[engine]):
        yield


KINDS = ("normal", "denormal", "wide", "huge", "zeros", "whole", "outlier", "constant")


def recipes(kinds=KINDS):
    """Arguments of `values`, which unlike tensors are short to print."""
    return st.tuples(SIZES, st.sampled_from(kinds), st.integers(0, 2**31))


def values(numel, kind, seed):
    """fp32 [numel] of one kind."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    if kind == "denormal":
        return x * 1e-40
    if kind == "wide":
        return x * torch.exp2(torch.randint(-140, 100, (numel,), generator=generator).float())
    if kind == "huge":
        return x.sign() * MAX * torch.rand(numel, generator=generator).round()
    if kind == "zeros":
        return x * 0  # of both signs
    if kind == "whole":  # many equal magnitudes
        return (2 * x).round()
    if kind == "outlier":
        x[torch.randint(numel, (1,), generator=generator)] = 1000.0
    return torch.full_like(x, float(x[0])) if kind == "constant" else x


def encode(method, x, residual=None, multiplier=1.0, seed=0):
    payload, error = torch.empty(method.wire_bytes(x.numel()), dtype=torch.uint8), torch.empty_like(x)
    finite = method.encode(x, payload, residual=residual, multiplier=multiplier, error=error, seed=seed)
    return finite, payload, error


def distance(a, b):
    return float((a.double() - b.double()).square().sum())


@every_engine
@every_method
def test_sent_plus_error_is_gradient_plus_residual(method, engine):
    method = METHODS[method]

    @settings(deadline=None, max_examples=60)
    @given(recipes(), recipes(), st.sampled_from([1.0, 0.5, 1 / 3, 4096.0]), st.integers(0, 2**63))
    def check(gradient, residual, multiplier, seed):
        gradient, residual = values(*gradient), values(gradient[0], *residual[1:])
        x = gradient + residual * multiplier
        before = gradient.clone(), residual.clone()
        finite, payload, error = encode(method, gradient, residual, multiplier, seed)
        assert torch.equal(gradient, before[0]) and torch.equal(residual, before[1])
        if not (method.name.startswith("int") and method.rotate and x.abs().max() >= 2.0**114):
            assert finite == bool(x.isfinite().all())
        if finite:
            sent = method.decompress(payload, x.numel(), seed).double()
            # The error is x - sent rounded once, so half a unit in its last place is all that may be missing.
            assert ((sent + error - x.double()).abs() <= error.abs().double() * 2.0**-24).all()
            total = torch.ones_like(x)
            method.decode(payload, total, add=True, seed=seed)
            assert torch.equal(total, 1 + sent.float())

    with using(engine):
        check()


@every_engine
@pytest.mark.parametrize("method", ["bf16", "int8", "int4", "topk", "topk_bf16", "randomk"])
def test_the_sum_is_exact_where_codes_are_within_a_factor_of_two_of_the_value(method, engine):
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    with using(engine):
        _, payload, error = encode(METHODS[method], x)
        assert torch.equal(METHODS[method].decompress(payload, x.numel()).double() + error, x.double())


def formula(method, n):
    """The docstrings', written anew."""
    blocks = [16384] * (n // 16384) + [n % 16384] * (n % 16384 > 0)
    kept = {ratio: sum(math.ceil(ratio * m) for m in blocks) for ratio in (0.01, 0.3, 0.07, 1, 0.1)}
    return {
        "bf16": 2 * n,
        "int8": n + 4 * math.ceil(n / 256),
        "int4": math.ceil(n / 2) + 4 * math.ceil(n / 256),
        "int8_rotated": n + 4 * math.ceil(n / 256),
        "int4_rotated": math.ceil(n / 2) + 4 * math.ceil(n / 256),
        "sign": math.ceil(n / 8) + 4 * math.ceil(n / 1024),
        "topk": 6 * kept[0.01],
        "topk_bf16": 4 * kept[0.3],
        "topk_int8": 3 * kept[0.07] + 4 * len(blocks),
        "topk_all": 3 * n + 4 * len(blocks),
        "randomk": 4 * kept[0.1],
    }[method]


@every_engine
@every_method
def test_the_payload_has_the_stated_bytes_and_fills_them(method, engine):
    with using(engine):
        for n in (*range(70), 255, 256, 257, 1024, 1025, 16384, 16385, 50_001):
            bytes_ = METHODS[method].wire_bytes(n)
            assert bytes_ == formula(method, n), n
            x, written = torch.randn(n), []
            for fill in (0, 255):
                memory = torch.full((bytes_ + 8,), fill, dtype=torch.uint8)
                METHODS[method].encode(x, memory[4:-4], error=torch.empty(n))
                assert (memory[:4] == fill).all() and (memory[-4:] == fill).all()
                written.append(memory[4:-4])
            assert torch.equal(*written), n


@every_engine
@pytest.mark.parametrize("method", [method for method in METHODS if method != "randomk"])
def test_contraction_holds(method, engine):
    method = METHODS[method]

    @settings(deadline=None, max_examples=100)
    @given(recipes(("normal", "zeros", "whole", "outlier", "constant")))
    def check(recipe):
        x = values(*recipe)
        payload = method.compress(x)
        bound = method.contraction(x.numel()) * distance(x, x * 0) * (1 + 1e-12)
        assert distance(method.decompress(payload, x.numel()), x) <= bound

    with using(engine):
        check()
    assert 0 <= method.contraction(0) < 1 and method.contraction(10**8) < 1


def test_contraction_of_random_k_holds_in_expectation_and_places_are_sent_equally_often():
    method = METHODS["randomk"]
    for n in (7, 1000, 16384 + 10):
        x = torch.randn(n, generator=torch.Generator().manual_seed(n)).double().float()
        sent = [method.decompress(method.compress(x, seed), n, seed) for seed in range(3000)]
        mean = sum(distance(one, x) for one in sent) / len(sent)
        assert mean <= method.contraction(n) * distance(x, x * 0) * 1.01
        often = sum((one != 0).double() for one in sent) / len(sent)
        kept = sum(method.kept(m) for m in (16384,) * (n // 16384) + (n % 16384,))
        assert abs(float(often.sum()) - kept) < 1e-6  # so no place is taken twice
        chance = torch.full((n,), method.kept(min(n, 16384)) / min(n, 16384))
        chance[n - n % 16384 :] = method.kept(n % 16384) / (n % 16384)
        assert (often - chance).abs().max() < 5 * 0.5 / 3000**0.5


def test_contraction_is_nearly_reached_by_the_worst_case():
    for name, levels in (("int8", 127), ("int4", 7)):
        x = torch.full((256,), 0.4999 / levels)
        x[3] = 1.0
        method = METHODS[name]
        assert distance(method.decompress(method.compress(x), 256), x) > 0.99 * method.contraction(256) * distance(
            x, x * 0
        )
    one = torch.eye(1, 1024)[0]
    for name, x in (("sign", one), ("topk", torch.ones(16384)), ("randomk", torch.ones(16384))):
        method = METHODS[name]
        found = distance(method.decompress(method.compress(x), x.numel()), x)
        assert found == pytest.approx(method.contraction(x.numel()) * distance(x, x * 0), rel=1e-4)


@every_engine
@every_method
def test_blocks_encoded_apart_are_the_bytes_of_the_whole(method, engine):
    method, numel = METHODS[method], 5 * 16384 + 77
    x = torch.randn(numel, generator=torch.Generator().manual_seed(3))
    residual = torch.randn(numel, generator=torch.Generator().manual_seed(4))
    blocks = numel // method.block
    with using(engine):
        _, payload, error = encode(method, x, residual, 0.7, seed=11)
        assert torch.equal(payload, encode(method, x, residual, 0.7, seed=11)[1])  # deterministic
        for first, last in ((0, 1), (1, 4), (blocks // 2, None), (blocks, None)):
            start, stop = first * method.block, numel if last is None else last * method.block
            _, part, kept = encode(method, x[start:stop], residual[start:stop], 0.7, seed=11 + first)
            assert torch.equal(part, payload[method.wire_bytes(start) : method.wire_bytes(stop)])
            assert torch.equal(kept, error[start:stop])
            sent = method.decompress(part, stop - start, seed=11 + first)
            assert torch.equal(sent, method.decompress(payload, numel, seed=11)[start:stop])


@every_engine
@every_method
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 20_000, 40_000])
def test_infinities_and_nan_are_refused_or_decode_to_nan_in_their_block_alone(method, engine, value, place):
    method, numel = METHODS[method], 40_001
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    clean = x.clone()
    x[place] = value
    start = place // method.block * method.block
    stop = min(start + method.block, numel)
    with using(engine):
        finite, payload, _ = encode(method, x, seed=2)
        assert not finite
        with pytest.raises(ValueError, match=f"{method.name} cannot compress infinities"):
            method.compress(x, seed=2)
        sent = method.decompress(payload, numel, seed=2)
        expected = method.decompress(method.compress(clean, seed=2), numel, seed=2)
    outside = torch.ones(numel, dtype=torch.bool)
    outside[start:stop] = False
    assert torch.equal(sent[outside], expected[outside])
    inside = sent[start:stop]
    assert inside.isnan().all() if not hasattr(method, "ratio") else inside.isnan().sum() == method.kept(stop - start)


@every_engine
@every_method
def test_zero_length_parts(method, engine):
    with using(engine):
        finite, payload, error = encode(METHODS[method], torch.empty(0))
        METHODS[method].decode(payload, error)
        METHODS[method].decode(payload, error, add=True)
    assert finite and payload.numel() == 0


def test_the_encoder_can_do_without_residual_and_error():
    x = torch.randn(20_000)
    for method in METHODS.values():
        assert torch.equal(method.compress(x), encode(method, x)[1])
        assert torch.equal(method.compress(x), encode(method, x, torch.zeros_like(x), 3.0)[1])


def test_fp32_is_lossless():
    x = torch.randn(1001)
    finite, payload, error = encode(Float32(), x, x, 0.5)
    assert finite and not error.any()
    assert torch.equal(Float32().decompress(payload, 1001), x + x * 0.5)
