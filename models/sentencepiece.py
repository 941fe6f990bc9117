"""SentencePiece's file of a unigram model, as much of it as a tokenizer needs.

The format is a protocol buffer, `sentencepiece_model.proto` of google/sentencepiece: message ModelProto with pieces (1:
text 1, score 2, kind 3), trainer_spec (2: model_type 3) and normalizer_spec (3: precompiled_charsmap 2).
"""

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path

from qvdjax.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
UNIGRAM = 1
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # wire types


@dataclasses.dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its number is its place. `kind` is one of the constants of this module."""

    text: str
    score: float
    kind: int


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """A vocabulary, and a compiled map of characters to their normal forms (empty where there is none)."""

    pieces: tuple[Piece, ...]
    character_map: bytes


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read the file.

    Raises:
        UserError: It is damaged, or of another kind of model than unigram.
        OSError: It cannot be read.
    """
    pieces, kind, character_map = [], UNIGRAM, b""
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                fields = dict(_fields(value))
                (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
                pieces.append(Piece(fields[1].decode("utf-8"), score, fields.get(3, NORMAL)))
            elif number == 2:
                kind = dict(_fields(value)).get(3, UNIGRAM)
            elif number == 3:
                character_map = dict(_fields(value)).get(2, b"")
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise UserError(f"{path} is no SentencePiece model", remedy="download it again") from error
    if kind != UNIGRAM or not pieces:
        raise UserError(f"{path} holds no unigram model", remedy="give the tokenizer as tokenizer.json")
    return SentencePieceModel(tuple(pieces), character_map)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of every field of a message: whole numbers, or the bytes of what is not one."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == _VARINT:
            value, at = _varint(message, at)
        else:
            sizes = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}
            size, at = _varint(message, at) if tag & 7 == _BYTES else (sizes[tag & 7], at)
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise ValueError("truncated")
        yield tag >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that starts at a place, seven bits a byte, lowest first; and the place after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
