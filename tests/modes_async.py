"""What the tests of mode "async" share: engines, a lockstep that makes it deterministic, a comparison of copies."""

import time

import deepspeed
import torch
import torch.distributed as dist
from compression_grid import Layers

import ds_recsys
from ds_recsys.method_hook import MethodHook

BASE = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "steps_per_print": 100_000,
}


def plain_engine(method="none", config=None, **options):
    torch.manual_seed(0)
    model = Layers()
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config or BASE)[0]
    compression = {"method": method, **({"min_elements": 1} if method != "none" else {})}
    ds_recsys.data_parallel(engine, "async", compression, **{"send_every": 1, **options})
    return engine


def step(engine, number):
    """One optimizer step on a batch that depends on `number` and the rank alone; the loss."""
    generator = torch.Generator().manual_seed(1000 * number + dist.get_rank())
    items = torch.randint(50, (8,), generator=generator)
    loss = engine(items, (3 * items + 1) % 50)
    engine.backward(loss)
    engine.step()
    return loss.item()


def train(engine, total, pause=0.0):
    """Until the replicas have taken `total` steps each on average; the losses of this one."""
    mode, losses = engine.data_parallel, []
    while mode.progress(mode.steps) < total:
        losses.append(step(engine, mode.steps))
        time.sleep(pause)
    return losses


def in_lockstep(mode):
    """Before an exchange, wait until all that any replica has sent is here: what happens then depends on no clock."""

    inside = []

    def exchange(method):
        inside.append(True)
        method()
        inside.pop()

    def look(method, *answer):
        if not inside:  # a meeting, which waits by itself
            return method(*answer)
        ledger, lines = mode.ledger, mode.wire.lines
        told = {replica: line.told for replica, line in lines.items()}
        mine = {r: (peer.sent, told[r]["consumed"], told[r]["steps"]) for r, peer in ledger.peers.items()}
        everyone = [None] * mode.data_size
        dist.all_gather_object(everyone, mine, group=mode.data_group)
        for replica, line in lines.items():
            sent, applied, steps = everyone[replica][mode.data_rank]
            deadline = time.monotonic() + 30
            while True:
                with mode.wire.changed:
                    note = line.note
                    if line.received == sent and (note["steps"], note["consumed"]) == (steps, applied):
                        break
                    assert time.monotonic() < deadline, (line.received, sent, note, steps, applied)
                    mode.wire.changed.wait(0.1)
        dist.barrier(mode.data_group)
        seen = method(*answer)
        dist.barrier(mode.data_group)  # nobody sends before all have looked
        return seen

    return MethodHook(mode, "after_step", exchange), MethodHook(mode, "_look", look)


def weights_of(engine):
    return torch.cat([parameter.detach().view(-1) for parameter in engine.module.parameters()])
