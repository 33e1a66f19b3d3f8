"""The kernels in C: the same bits as torch, built once, by any number of processes, and done without where they cannot be."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_comm_compressors import COMPILED, METHODS, encode, every_method, recipes, using, values
from torch.utils._python_dispatch import TorchDispatchMode

from ds_recsys.comm.compressors import compressor
from ds_recsys.comm.kernels import build, native, throughput

needs_compiler = pytest.mark.skipif(COMPILED is None, reason="no C compiler here")


def bits(tensor):
    return tensor.view(torch.int32)


@needs_compiler
@every_method
def test_c_and_torch_give_the_same_bits(method):
    method = METHODS[method]

    @settings(deadline=None, max_examples=100)
    @given(recipes(), recipes(), st.sampled_from([1.0, 1 / 3, 65536.0]), st.integers(0, 2**64 - 1), st.booleans())
    def check(gradient, residual, multiplier, seed, broken):
        gradient, residual = values(*gradient), values(gradient[0], *residual[1:])
        if broken:
            gradient[len(gradient) // 2] = torch.nan
        outcomes = []
        for engine in ("c", "torch"):
            with using(engine):
                finite, payload, error = encode(method, gradient, residual, multiplier, seed)
                added = gradient * 0.3
                sent = method.decompress(payload, len(gradient), seed)
                sent_last = torch.full_like(gradient, 7.0)
                method.decode(payload, sent_last, last=True, seed=seed)
                method.decode(payload, added, add=True, seed=seed)
                outcomes.append((finite, payload, error, sent, added, sent_last))
        (c, *of_c), (torch_, *of_torch) = outcomes
        assert c == torch_ and torch.equal(of_c[0], of_torch[0])
        if c:
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(of_c[1:], of_torch[1:], strict=True))
        else:
            torch.testing.assert_close(of_c[2], of_torch[2], rtol=0, atol=0, equal_nan=True)

    check()


@needs_compiler
@every_method
def test_the_sum_of_payloads_is_encoded_as_if_it_had_been_decoded(method):
    method = METHODS[method]

    @settings(deadline=None, max_examples=100)
    @given(recipes(), recipes(), st.integers(1, 4), st.sampled_from([1.0, 1 / 3]), st.booleans())
    def check(gradient, residual, count, multiplier, broken):
        gradient, residual = values(*gradient), values(gradient[0], *residual[1:])
        size, outcomes = len(gradient), []
        payloads = [torch.empty(method.wire_bytes(size), dtype=torch.uint8) for _ in range(count)]
        for number, payload in enumerate(payloads):
            term = gradient * (1.0 - 0.7 * number)
            if broken and number == count - 1:
                term[size // 2] = torch.inf
            method.encode(term, payload, seed=3)
        total = torch.empty(size)
        for number, payload in enumerate(payloads):
            method.decode(payload, total, add=number > 0, seed=3)
        expected, dense = encode(method, total, residual, multiplier, 3), total.clone()
        for engine in ("c", "torch"):
            with using(engine):
                payload, error = torch.empty_like(payloads[0]), torch.empty(size)
                given = {"residual": residual, "multiplier": multiplier, "error": error, "seed": 3}
                outcomes.append((method.recode(payloads, payload, torch.empty(size), **given), payload, error))
                out = torch.full((size,), 7.0)
                method.sum(payloads, out, seed=3)
                torch.testing.assert_close(out, dense, rtol=0, atol=0, equal_nan=True)
        for finite, payload, error in outcomes:
            assert finite == expected[0] and torch.equal(payload, expected[1])
            assert not finite or torch.equal(bits(error), bits(expected[2]))

    check()


@pytest.mark.parametrize("method", METHODS)
def test_torch_waits_for_a_device_once_per_encode_and_never_in_decode(method):
    class Waits(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            waits = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
            self.seen += function.overloadpacket.__name__ in waits
            return function(*args, **(kwargs or {}))

    x = torch.randn(5 * 16384)  # several chunks
    with using("torch"):
        with Waits() as waits:
            _, payload, _ = encode(METHODS[method], x, x, 0.5)
        assert waits.seen == 1
        with Waits() as waits:
            METHODS[method].decode(payload, x, add=True)
        assert waits.seen == 0


@needs_compiler
def test_threads_may_encode_at_once():
    method = compressor("int8")
    inputs = [torch.full((4_000_000,), 1.0 + index) for index in range(3)]
    expected, found = [method.compress(x) for x in inputs], [None] * 3

    def work(index):
        found[index] = [method.compress(inputs[index]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for payload, payloads in zip(expected, found, strict=True):
        assert all(torch.equal(payload, one) for one in payloads)


def compiler(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_without_a_compiler_torch_does_the_work(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with caplog.at_level(logging.INFO, logger="ds_recsys"):
        assert native.library.__wrapped__() is None
    assert "no C compiler: none of cc, gcc, clang" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("script", ["echo 'x.c:1: error: no such thing' >&2; exit 1", "kill -9 $$", "exec /nowhere"])
def test_a_build_that_fails_falls_back_and_leaves_nothing(tmp_path, monkeypatch, caplog, script):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    compiler(tmp_path / "bin", "cc", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with caplog.at_level(logging.INFO, logger="ds_recsys"):
        assert native.library.__wrapped__() is None
    assert "bin/cc failed" in caplog.text and (("no such thing" in caplog.text) == ("echo" in script))
    assert not list((tmp_path / "built" / "ds_recsys").iterdir())


@needs_compiler
def test_the_next_compiler_is_tried(tmp_path, monkeypatch):
    compiler(tmp_path / "bin", "cc", "exit 1")
    compiler(tmp_path / "bin", "gcc", f'PATH={os.environ["PATH"]} exec cc "$@"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert native.load(tmp_path / "built")


def test_what_cannot_be_loaded_or_written_falls_back(tmp_path, monkeypatch, caplog):
    compiler(tmp_path / "bin", "cc", 'for last; do :; done; echo nonsense > "$last"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    with caplog.at_level(logging.INFO, logger="ds_recsys"):
        assert native.library.__wrapped__() is None
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
        assert native.library.__wrapped__() is None
    assert "Not a directory" in caplog.text
    with pytest.raises(build.BuildError, match="file/ds_recsys: Not a directory"):
        build.build(native.folder())


def test_the_environment_switches_them_off(monkeypatch, caplog):
    monkeypatch.setenv("DS_RECSYS_KERNELS", "0")
    with caplog.at_level(logging.INFO, logger="ds_recsys"):
        assert native.library.__wrapped__() is None
    assert "DS_RECSYS_KERNELS=0" in caplog.text


@needs_compiler
def test_a_build_is_kept_a_damaged_one_made_again_and_a_killed_one_not_waited_for(tmp_path, monkeypatch):
    library = build.build(tmp_path)
    written = library.stat().st_mtime_ns
    assert build.build(tmp_path) == library and library.stat().st_mtime_ns == written
    library.unlink()
    library.write_bytes(b"half a library")
    (tmp_path / f"{library.stem}abc.tmp").write_bytes(b"of a killed compiler")
    assert native.load(tmp_path)
    assert library.stat().st_size > 10_000
    monkeypatch.setattr(build, "_cpu", lambda: "another")
    assert build.build(tmp_path) != library


@needs_compiler
def test_processes_may_build_at_once(tmp_path):
    work = (
        "from ds_recsys.comm.kernels.native import load; from pathlib import Path; import sys; load(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", work, str(tmp_path / "built")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outcomes = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outcomes
    assert [path.suffix for path in (tmp_path / "built").iterdir()] == [".so"]


@needs_compiler
def test_the_compiler_has_no_warnings(tmp_path):
    sources = sorted(map(str, Path(build.__file__).parent.glob("*.c")))
    command = [*build.COMPILERS[:1], *build.FLAGS, "-Wall", "-Wextra", "-Wno-unused-parameter", *sources]
    outcome = subprocess.run([*command, "-o", str(tmp_path / "x.so")], capture_output=True, text=True)
    assert not outcome.stderr


def test_throughput_is_gigabytes_of_gradient_per_second(monkeypatch):
    ticks = iter([10.0, 10.5, 20.0, 20.1, 30.0, 30.9])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    before = torch.get_num_threads()
    assert throughput(compressor("int8"), 1000, 3) == pytest.approx(4000 / 0.5 / 1e9)
    assert torch.get_num_threads() == before
