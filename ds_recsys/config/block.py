"""Turns a dict into the typed "recsys" block, and pydantic's errors into one line a user can act on."""

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ds_recsys.config.deepspeed_keys import TOP_LEVEL, nearest
from ds_recsys.config.schema import Recsys
from ds_recsys.errors import UserError


def parse_block(block: Any, source: str) -> Recsys:
    """The typed block. Raises `UserError`, one line, for the first thing that is wrong with it."""
    if not isinstance(block, dict):
        raise UserError(f'{source}: "recsys" is {block!r}; give an object, such as {{"pipe": 2}}')
    try:
        return Recsys.model_validate(block)
    except ValidationError as error:
        raise UserError(f"{source}: {_one_line(error)}") from None


def sub_model(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of field `name` when it is a block itself (also when it may be null), else None."""
    annotation = model.model_fields[name].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _one_line(error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    # A misspelt key is the cause of other errors more often than their result, so it is told first.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    if first["type"] == "extra_forbidden":
        return _unknown_key(first["loc"])
    path = _path(first["loc"])
    # A union ("a number or "auto"") reports one error per member, all at the same path.
    messages = dict.fromkeys(_message(e) for e in errors if _path(e["loc"]) == path)
    key = ".".join(["recsys", *path])
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        return f'"{key}": {_message(first)}'
    if first["type"] in ("model_type", "model_attributes_type"):
        return f'"{key}" is {first["input"]!r}; give an object'
    return f'"{key}" is {first["input"]!r}: {" or ".join(messages)}'


def _message(error: Any) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return error["msg"].replace("Input should be", "it should be").replace("'auto'", '"auto"')


def _path(loc: tuple[int | str, ...]) -> list[str]:
    """The keys of `loc`, without the names pydantic gives to the members of a union."""
    path: list[str] = []
    model: type[BaseModel] | None = Recsys
    for part in loc:
        if isinstance(part, int):
            path.append(str(part))
        elif model is not None and part in model.model_fields:
            path.append(part)
            model = sub_model(model, part)
    return path


def _unknown_key(loc: tuple[int | str, ...]) -> str:
    *parents, key = map(str, loc)
    model = Recsys
    for parent in parents:
        model = sub_model(model, parent)
    where = ".".join(["recsys", *parents])
    meant = nearest(key, model.model_fields)
    if meant is None and key in _homes():
        meant = _homes()[key]
        hint = f'it is a key of "{meant}"' if meant else 'it is a key of "recsys" itself'
    elif meant is None and key in TOP_LEVEL:
        hint = 'it is a key of DeepSpeed: put it at the top level, beside "recsys"'
    elif meant is None:
        # No near match: the best guess is still worth more than none.
        guess = nearest(key, model.model_fields, cutoff=0.5)
        valid = f"valid keys: {', '.join(model.model_fields)}"
        hint = f'the nearest is "{guess}"; {valid}' if guess else valid
    else:
        hint = f'did you mean "{meant}"?'
    return f'unknown key "{key}" in "{where}"; {hint}'


def _homes() -> dict[str, str]:
    """For each key, the dotted name of the block it belongs to ("" for the block itself)."""
    homes = dict.fromkeys(Recsys.model_fields, "")
    for name in Recsys.model_fields:
        model = sub_model(Recsys, name)
        if model is not None:
            homes.update({key: f"recsys.{name}" for key in model.model_fields if key not in homes})
    return homes
