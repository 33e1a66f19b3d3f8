"""A synthetic interaction log with something to learn: most users walk the catalogue in steps of their own stride."""

import csv
import random
from pathlib import Path


def write_log(path: Path, users: int = 60, items: int = 40, seed: int = 0) -> Path:
    """CSV with user, item, timestamp, title; histories of 6 to 24 items."""
    generator = random.Random(seed)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "timestamp", "title"])
        for user in range(users):
            position, stride = generator.randrange(items), generator.choice([1, 1, 2, 3])
            for time in range(generator.randint(6, 24)):
                item = position if generator.random() < 0.85 else generator.randrange(items)
                writer.writerow([f"u{user}", f"i{item}", time, f"Item number {item}"])
                position = (position + stride) % items
    return path


def config(**recsys) -> dict:
    """A small GPT-2 with dropout, so that every random number generator matters."""
    return {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_max_lr": 3e-3},
        },
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "recsys": {
            "pipe": 2,
            "seed": 1,
            "dataset": {
                "max_length": 16,
                "columns": {"user": "user", "item": "item", "timestamp": "timestamp", "title": "title"},
            },
            "model": {"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}},
            "training": {"epochs": 4},
            **recsys,
        },
    }
