"""The generated reference of the "recsys" block: a Markdown table for the README and a JSON schema for editors."""

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from ds_recsys.config.block import sub_model
from ds_recsys.config.schema import Recsys

MARKER = "<!-- recsys-reference -->"


def recsys_schema() -> dict[str, Any]:
    """JSON schema of the block (https://json-schema.org), with every description."""
    return Recsys.model_json_schema()


def reference_markdown() -> str:
    """The table of all keys between two `MARKER` lines: what the README holds, letter for letter."""
    rows = "\n".join(_rows(Recsys, ""))
    return f"{MARKER}\n| key | type | default | meaning |\n|---|---|---|---|\n{rows}\n{MARKER}\n"


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = sub_model(model, name)
        default = field.get_default(call_default_factory=True)
        if inner is None:
            kind, text = _type_name(field.annotation), (field.description or "").replace("|", "\\|")
            yield f"| `{prefix}{name}` | {kind} | `{json.dumps(default)}` | {text} |"
            continue
        if default is None:
            yield f"| `{prefix}{name}` | object or null | `null` | {field.description} |"
        yield from _rows(inner, f"{prefix}{name}.")


def _type_name(annotation: Any) -> str:
    """The JSON name of a type: `int | Literal["auto"]` -> `integer or "auto"`."""
    names = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    if annotation in names:
        return names[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f'`"{value}"`' for value in args)
    if origin is list:
        return f"list of {_type_name(args[0])}"
    if origin is dict:
        return "object"
    if hasattr(annotation, "__metadata__"):  # Annotated[int, Field(gt=0)]
        return _type_name(args[0])
    return " or ".join(_type_name(arg) for arg in args)
