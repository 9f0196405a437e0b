"""A SentencePiece file (tokenizer.model) read into a Llama tokenizer, without the packages sentencepiece and protobuf.

Older checkpoints hold their vocabulary in this form only. The file is a protocol buffer; three of its fields are
needed. Byte-pair models only, which all of Llama's are. Knows nothing about models or prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from transformers import LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

from model.errors import UserError

PIECES, TRAINER, TEXT, KIND = 1, 2, 1, 3  # fields: of the model, of the model, of a piece, of the trainer's settings
BYTE_PAIRS = 2  # the trainer's model_type; 1 is unigram
SETTINGS = ("add_bos_token", "add_eos_token", "legacy", "model_max_length", "padding_side")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_tokenizer(folder: Path) -> LlamaTokenizer:
    """The tokenizer of a folder with tokenizer.model, and tokenizer_config.json and special_tokens_map.json if there.

    UserError where the vocabulary is damaged or of another kind.
    """
    file = folder / "tokenizer.model"
    try:
        kind, pieces = read(file.read_bytes())
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"The vocabulary {file} cannot be read: {error}; download it again.") from error
    if kind != BYTE_PAIRS or not pieces:
        raise UserError(f"The vocabulary {file} is no byte-pair model; only those are read, as Llama's are.")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    written = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    special = {name: _text(written[name]) for name in SPECIAL if written.get(name)}
    settings = {name: written[name] for name in SETTINGS if written.get(name) is not None}
    return LlamaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary), **settings, **special)


def read(data: bytes) -> tuple[int, list[str]]:
    """(kind of model, its pieces in order of id) of a SentencePiece file; ValueError or IndexError where it is damaged.

    The kind is 1, unigram, where the file does not say, as in SentencePiece itself.
    """
    kind, pieces = 1, []
    for field, value in _fields(data):
        if field == PIECES:
            pieces.append(dict(_fields(value))[TEXT].decode("utf-8"))
        elif field == TRAINER:
            kind = dict(_fields(value)).get(KIND, kind)
    return kind, pieces


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protocol buffer message."""
    if not isinstance(data, bytes):
        raise ValueError("a number where a message was expected")
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        if key & 7 == 0:
            value, at = _number(data, at)
        else:
            if key & 7 == 2:
                size, at = _number(data, at)
            else:
                size = {1: 8, 5: 4}.get(key & 7, len(data))
            value, at = data[at : at + size], at + size
        if at > len(data):
            raise ValueError("it is cut off or damaged")
        yield key >> 3, value


def _number(data: bytes, at: int) -> tuple[int, int]:
    """(a number of seven bits a byte, lowest first; where it ends)."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at


def _json(file: Path) -> dict:
    return {k: v for k, v in json.loads(file.read_text(encoding="utf-8")).items() if v} if file.is_file() else {}


def _text(token: str | dict) -> str:
    """A special token's text; files give it as such or with its flags."""
    return token["content"] if isinstance(token, dict) else token
