"""The Trainer's part in `recsys.partition.method` "profile" and "adaptive"."""

from tqdm import tqdm

from ds_recsys.balance.adaptive import AdaptivePartition
from ds_recsys.balance.decide import Rule
from ds_recsys.balance.report import describe, plot, write
from ds_recsys.callbacks import Callback
from ds_recsys.method_hook import MethodHook


class PartitionCallback(Callback):
    """Lets layers move after steps of `train()`. The run's folder gets balance.json and, of stages, balance.png."""

    def on_train_begin(self, trainer) -> None:
        options = trainer.config.recsys.partition
        self._balance = AdaptivePartition(
            trainer.engine,
            method=options.method,
            total_steps=trainer.total_steps,
            rule=Rule(gain=options.min_gain),
            memory_limit=memory_limit(options),
            announce=tqdm.write,
        )

    def on_step_end(self, trainer, loss) -> None:
        self._balance()

    def on_train_end(self, trainer) -> None:
        self._balance.close()
        if trainer.is_main and self._balance.records:
            print(describe(self._balance), flush=True)
            write(self._balance, trainer.run_dir / "balance.json")
            plot(self._balance.records, self._balance.moves, trainer.run_dir / "balance.png")


def balance_after_steps(engine, options) -> None:
    """Let an engine that its user drives balance itself, after each `train_batch`; sets `engine.adaptive_partition`."""
    balance = AdaptivePartition(
        engine, method=options.method, rule=Rule(gain=options.min_gain), memory_limit=memory_limit(options)
    )

    def train_batch(method, *args, **kwargs):
        loss = method(*args, **kwargs)
        balance()
        return loss

    engine.adaptive_partition = balance
    MethodHook(engine, "train_batch", train_batch)


def memory_limit(options) -> int | None:
    """Bytes that a rank may hold, by the config's "partition" block."""
    from deepspeed.accelerator import get_accelerator

    if options.memory_gb is not None:
        return round(1e9 * options.memory_gb)
    accelerator = get_accelerator()
    return None if accelerator.device_name() == "cpu" else round(0.9 * accelerator.total_memory())
