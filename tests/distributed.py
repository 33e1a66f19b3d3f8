"""Run a plain function on every rank of a grid: gloo processes forked from one warmed parent.

    @distributed(pipe=2, data=2)
    def test_something(tmp_path):        # the body runs on 4 ranks
        assert torch.distributed.get_world_size() == 4

The first rank to raise fails the test with its traceback; a rank that is still running at the time-out fails it by name,
with the stack it was stuck in. Importing torch, deepspeed and transformers takes about 6 s of CPU, so it is paid once, in
a fork server that computes nothing itself (forking a process whose thread pools are warm is not safe). What it imported
is not garbage: a rank's collections, of which DeepSpeed makes several for each engine, do not look through it.
"""

import faulthandler
import functools
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback

_WARM = """
    torch deepspeed transformers transformers.models.llama.modeling_llama transformers.models.auto.tokenization_auto
    tokenizers.trainers datasets pyarrow.csv pytest ds_recsys.trainer ds_recsys.balance ds_recsys.planner.choose
    deepspeed.module_inject.auto_ep_layer deepspeed.runtime.zero.muon.muon_optimizer
""".split()  # the last two DeepSpeed imports as it makes an engine; Muon's compiles functions of its own
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_WARM)


def distributed(pipe=1, data=1, tensor=1, timeout=120):
    """Decorate a test: its body runs on `pipe * data * tensor` ranks. Fixtures and parameters must be picklable."""

    def decorate(test):
        @functools.wraps(test)
        def run(**arguments):
            run_on_grid(test, pipe * data * tensor, timeout=timeout, **arguments)

        return run

    return decorate


def run_on_grid(function, world_size, *, timeout=120, **arguments):
    """Run `function(**arguments)` on `world_size` ranks and return what each rank returned, in rank order.

    Raises AssertionError with the traceback of the first rank that failed, or with the name and stack of every stuck rank.
    """
    with tempfile.TemporaryDirectory() as scratch:
        ranks, pipes = [], []
        for rank in range(world_size):
            receive, send = _context.Pipe(duplex=False)
            place = (function.__module__, function.__qualname__)
            process = _context.Process(
                target=_work, args=(rank, world_size, scratch, timeout, place, arguments, send), daemon=True
            )
            process.start()
            send.close()
            ranks.append(process)
            pipes.append(receive)
        try:
            return _collect(ranks, pipes, scratch, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(ranks, pipes, scratch, deadline):
    results, waiting = {}, dict(zip(pipes, range(len(ranks)), strict=True))
    while waiting:
        ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            stuck = "\n".join(f"rank {r} is stuck:\n{_read(f'{scratch}/stack{r}')}" for r in sorted(waiting.values()))
            raise AssertionError(f"timed out\n{stuck}")
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ranks[rank].join()
                ok, value = False, f"the process ended with exit code {ranks[rank].exitcode}"
            if not ok:
                raise AssertionError(f"rank {rank} failed\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(ranks))]


def _read(path):
    try:
        with open(path) as file:
            return file.read() or "(no stack)"
    except OSError:
        return "(no stack)"


def _work(rank, world_size, scratch, timeout, place, arguments, send):
    with open(f"{scratch}/stack{rank}", "w") as stack:
        faulthandler.dump_traceback_later(max(1.0, timeout - 2.0), file=stack)
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
            gc.freeze()
            import torch

            from ds_recsys.topology import init_distributed

            torch.set_num_threads(1)
            init_distributed(init_method=f"file://{scratch}/store", rank=rank, world_size=world_size)
            function = importlib.import_module(place[0])
            for name in place[1].split("."):
                function = getattr(function, name)
            function = getattr(function, "__wrapped__", function)
            message = (True, function(**arguments))
        except BaseException:
            message = (False, traceback.format_exc())
        send.send_bytes(
            pickle.dumps(message)
        )  # by value: torch's own pickler would share memory that dies with this rank
        sys.stdout.flush()
        faulthandler.cancel_dump_traceback_later()
        os._exit(0)  # leaving through gloo's destructors while a peer is already gone can hang
