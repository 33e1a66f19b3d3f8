"""Reads a ds_config file: strict JSON, plus the comments and trailing commas that DeepSpeed's own reader allows."""

import difflib
import json
import re
from pathlib import Path
from typing import Any

from ds_recsys.errors import UserError

# A string is matched first, so that `//` inside "hdfs://..." is not taken for a comment.
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/\*.*?\*/', re.DOTALL)
_STRING_OR_TRAILING_COMMA = re.compile(r'"(?:\\.|[^"\\\n])*"|,(?=\s*[}\]])')


class _DuplicateKey(Exception):
    pass


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in `path`.

    `//`, `#` and `/* */` comments and trailing commas are accepted (DeepSpeed reads its configs as Hjson); everything
    else is strict JSON, so that Hugging Face's tools can read the same file once the comments are gone.

    Raises `UserError` with file:line:column when the file is missing, is not UTF-8, is not JSON, repeats a key or
    holds something else than an object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file{_nearby(Path(path))}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the config: {error.strerror}; give the path of a JSON file") from None
    return parse_json(text, str(path))


def parse_json(text: str, source: str) -> dict[str, Any]:
    """The object in `text`; `source` names it in errors. Raises as `read_json` does."""
    # Blanks of the same shape keep every line and column of the error messages true.
    strict = _STRING_OR_COMMENT.sub(lambda m: m[0] if m[0][0] == '"' else re.sub(r"[^\n]", " ", m[0]), text)
    strict = _STRING_OR_TRAILING_COMMA.sub(lambda m: " " if m[0] == "," else m[0], strict)
    try:
        value = json.loads(strict, object_pairs_hook=_object_without_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        what = error.msg[0].lower() + error.msg[1:]
        raise UserError(f"{source}:{error.lineno}:{error.colno}: not valid JSON: {what}; correct this line") from None
    except _DuplicateKey as error:
        lines = _lines_of_key(strict, error.args[0])
        raise UserError(
            f'{source}:{lines[-1]}: key "{error.args[0]}" is given twice in one object '
            f"(it occurs on lines {', '.join(map(str, lines))}); keep one of them"
        ) from None
    except RecursionError:
        raise UserError(f"{source}: not valid JSON: nested too deeply; correct the brackets") from None
    except ValueError as error:
        raise UserError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{source}: holds a {type(value).__name__}, not a JSON object; start the file with {{")
    return value


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKey(key)
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number; give a finite number")


def _lines_of_key(text: str, key: str) -> list[int]:
    pattern = re.compile(re.escape(json.dumps(key)) + r"\s*:")
    return [text.count("\n", 0, match.start()) + 1 for match in pattern.finditer(text)] or [1]


def _nearby(path: Path) -> str:
    """What to do about a missing file: the nearest name beside it, if there is one."""
    beside = [entry.name for entry in path.parent.glob("*.json")] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.with_name(nearest[0])}?" if nearest else "; give the path of a ds_config JSON"
