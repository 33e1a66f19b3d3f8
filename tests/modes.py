"""What the tests of the data-parallel modes share: engines, batches, and single-process references written from the papers."""

import deepspeed
import torch
import torch.distributed as dist
from compression_grid import Layers

import ds_recsys

ADAM = {"type": "AdamW", "params": {"lr": 5e-3, "weight_decay": 0.01, "torch_adam": True}}
SGD = {"type": "SGD", "params": {"lr": 0.3, "momentum": 0.9}}
MICRO_BATCHES, ROWS = 2, 4


def config(optimizer=ADAM, **changes) -> dict:
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": optimizer,
        "gradient_clipping": 0.0,
        "steps_per_print": 100_000,
        "zero_allow_untested_optimizer": True,
        **changes,
    }


def small_model() -> Layers:
    """Its values are below 1, so that fp32's last digit is below 1e-7."""
    torch.manual_seed(0)
    model = Layers()
    model.embedding.weight.data.mul_(0.2)
    return model


def engine(mode=None, values=None, compression=None, **options):
    model = small_model()
    made = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=values or config())[0]
    if mode:
        ds_recsys.data_parallel(made, mode, compression, **options)
    return made


def batch(step: int, replica: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The micro-batches of a step, of pairs with something to learn."""
    generator = torch.Generator().manual_seed(1000 * step + replica)
    drawn = [torch.randint(50, (ROWS,), generator=generator) for _ in range(MICRO_BATCHES)]
    return [(items, (3 * items + 1) % 50) for items in drawn]


def train(made, first: int, last: int, poisoned=()) -> list[float]:
    """Losses of steps first to last - 1; `poisoned`: (step, replica) whose loss becomes NaN."""
    losses = []
    for step in range(first, last):
        for items, targets in batch(step, dist.get_rank()):
            loss = made(items, targets)
            if (step, dist.get_rank()) in poisoned:
                loss = loss * float("nan")
            made.backward(loss)
            made.step()
            losses.append(loss.item())
    return losses


def weights(made) -> dict[str, torch.Tensor]:
    module = getattr(made, "module", made)
    return {name: parameter.detach().float().clone() for name, parameter in module.named_parameters()}


def farthest(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def clipped(gradients: dict[str, torch.Tensor], norm: float | None) -> dict[str, torch.Tensor]:
    """By their norm together."""
    found = torch.cat([gradient.view(-1) for gradient in gradients.values()]).norm()
    factor = 1.0 if norm is None else min(1.0, norm / found.item())
    return {name: factor * gradient for name, gradient in gradients.items()}


class Reference:
    """Replicas in one process: models that begin alike, and an inner optimizer each."""

    def __init__(self, replicas: int, optimizer=ADAM):
        self.models = []
        for _ in range(replicas):
            self.models.append(small_model())
        kind = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}[optimizer["type"]]
        options = {key: value for key, value in optimizer["params"].items() if key != "torch_adam"}
        self.optimizers = [kind(model.parameters(), **options) for model in self.models]

    def gradients(self, replica: int, step: int, model: int | None = None) -> dict[str, torch.Tensor]:
        """Of the mean loss of one replica's batch."""
        chosen = self.models[replica if model is None else model]
        chosen.zero_grad()
        for items, targets in batch(step, replica):
            (chosen(items, targets) / MICRO_BATCHES).backward()
        return {name: p.grad.clone() for name, p in chosen.named_parameters()}

    def step(self, model: int, gradients: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.models[model].named_parameters():
            parameter.grad = gradients[name].clone()
        self.optimizers[model].step()

    def local_step(self, step: int, clip: float | None = None) -> None:
        """Each replica on its own, by the norm of its own gradients."""
        for replica in range(len(self.models)):
            self.step(replica, clipped(self.gradients(replica, step), clip))

    def dense_step(self, step: int) -> None:
        """Averaged gradients."""
        gradients = mean([self.gradients(replica, step) for replica in range(len(self.models))])
        for replica in range(len(self.models)):
            self.step(replica, gradients)

    def set(self, values: dict[str, torch.Tensor], replica: int | None = None) -> None:
        for model in self.models if replica is None else [self.models[replica]]:
            for name, parameter in model.named_parameters():
                if name in values:
                    parameter.data.copy_(values[name])

    def weights(self, replica: int = 0) -> dict[str, torch.Tensor]:
        return weights(self.models[replica])

    def mean(self) -> dict[str, torch.Tensor]:
        return mean([weights(model) for model in self.models])


def mean(dicts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: sum(values[name] for values in dicts) / len(dicts) for name in dicts[0]}
