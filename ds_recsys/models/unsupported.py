"""HF causal-LM types that are known not to convert, each with the reason, and the error that names it."""

from typing import NoReturn

from ds_recsys.errors import UserError

UNSUPPORTED: dict[str, str] = {}


def refuse(model_type: str, reason: str) -> NoReturn:
    """Raise the one error for a model that cannot be cut into pipeline stages."""
    raise UserError(f"model type {model_type!r} cannot be cut into pipeline stages: {reason}")


def check_supported(model_type: str) -> None:
    """Raise `UserError` for a type of the table; types not in it are tried."""
    if model_type in UNSUPPORTED:
        refuse(model_type, UNSUPPORTED[model_type])
