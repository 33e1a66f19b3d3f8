"""The benchmarks behind the README's figures, a module each; launch/bench.py runs them, harness.py says what one offers."""

import importlib
from types import ModuleType

NAMES = ("quality", "head", "baselines", "timeline", "compression", "balance", "modes", "hybrid")


def load(name: str) -> ModuleType:
    """The module of one benchmark. What takes seconds to import (torch, DeepSpeed) it imports when it measures."""
    return importlib.import_module(f"benchmarks.{name}")
