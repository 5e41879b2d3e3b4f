"""The files of a tokenizer directory: `tokenizer.model` and the JSON that lists what is not in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from yuan2_core.errors import TokenizerError
from yuan2_core.special_tokens import EOD, PAD, SEP

MODEL_FILE: Final = "tokenizer.model"
CONFIG_FILE: Final = "tokenizer_config.json"
SPECIAL_FILE: Final = "special_tokens_map.json"
ADDED_FILE: Final = "added_tokens.json"

_UNBOUNDED: Final = int(1e30)
"""`transformers`' own value for "no limit"; the length limit of Yuan 2.0 stands in the model's
config.json."""


def read_added_tokens(directory: Path) -> dict[str, int]:
    """Tokens with fixed ids that the JSON files beside a model list; empty when there are none.

    Both places that `transformers` has used are read: `added_tokens.json` (text to id) and
    `added_tokens_decoder` in `tokenizer_config.json` (id to description).

    Raises:
        TokenizerError: a file that is not what it should be, or two ids for one token.
    """
    added: dict[str, int] = {}
    for text, token, file in (*_from_added_file(directory), *_from_config(directory)):
        if added.setdefault(text, token) != token:
            raise TokenizerError(
                f"{file}: token {text} has id {token} here and {added[text]} in {ADDED_FILE}"
            )
    by_id: dict[int, str] = {}
    for text, token in added.items():
        if by_id.setdefault(token, text) != text:
            raise TokenizerError(f"{directory}: added tokens {by_id[token]} and {text} share id {token}")
    return added


def write_tokenizer(directory: Path, model: bytes, special_ids: Mapping[str, int]) -> None:
    """Write a tokenizer directory that `transformers` (slow Llama tokenizer, legacy behaviour) reads the
    same way."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MODEL_FILE).write_bytes(model)
    roles = {"bos_token": "<s>", "eos_token": EOD, "unk_token": "<unk>", "sep_token": SEP, "pad_token": PAD}
    in_order = sorted(special_ids.items(), key=lambda item: item[1])
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _UNBOUNDED,
        "sp_model_kwargs": {},
        **roles,
        "added_tokens_decoder": {str(token): _description(text) for text, token in in_order},
    }
    _write_json(directory / CONFIG_FILE, config)
    _write_json(directory / SPECIAL_FILE, roles)


def _description(text: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": text, **flags}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _from_added_file(directory: Path) -> list[tuple[str, int, Path]]:
    file = directory / ADDED_FILE
    return [(text, _id(token, file, text), file) for text, token in _read_object(file).items()]


def _from_config(directory: Path) -> list[tuple[str, int, Path]]:
    file = directory / CONFIG_FILE
    listed = _read_object(file).get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise TokenizerError(f"{file}: added_tokens_decoder must be an object of ids")
    found = []
    for token, description in listed.items():
        text = description.get("content") if isinstance(description, dict) else None
        if not isinstance(text, str):
            raise TokenizerError(f"{file}: added_tokens_decoder.{token}: has no content")
        found.append((text, _id(token, file, text), file))
    return found


def _id(value: object, file: Path, text: str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise TokenizerError(f"{file}: token {text}: {value!r} is not an id")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file}: must hold a JSON object")
    return content
