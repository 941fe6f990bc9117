"""Texts -> numbers of tokens, by the files of a tokenizer's folder and the package `tokenizers`, without PyTorch.

Three layouts are read: `tokenizer.json`; `spiece.model` of T5; `vocab.json` and `merges.txt` of CLIP. What the latter
two leave out, how a text is normalised and cut before its pieces are looked up, is as in transformers 5.24
`models/t5/tokenization_t5.py` and `models/clip/tokenization_clip.py`.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.sentencepiece import CONTROL, UNKNOWN, USER_DEFINED, read_sentencepiece
from qvdjax.checkpoint.folder import read_json
from qvdjax.errors import UserError

TOKENIZER, SENTENCEPIECE, VOCABULARY, MERGES = "tokenizer.json", "spiece.model", "vocab.json", "merges.txt"
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Texts as numbers, all of one length.

    Attributes:
        numbers: int32 (texts, length); padding comes last.
        mask: bool (texts, length), False for padding.
        cut: (texts,) how many tokens of each text were too many.
    """

    numbers: np.ndarray
    mask: np.ndarray
    cut: tuple[int, ...]


class TextTokenizer:
    """The tokenizer of a folder.

    Attributes:
        path: The folder.
        padding: The number that fills a text up.
    """

    def __init__(self, path: str | os.PathLike):
        """Read a tokenizer.

        Raises:
            UserError: The package or a file is missing, or a file cannot be understood.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path} does not exist", remedy="download the tokenizer's folder of the model")
        self._tokenizer = _read(self.path, _package())
        self._tokenizer.no_padding()
        special = {**_json_of(self.path / "special_tokens_map.json"), **_json_of(self.path / "tokenizer_config.json")}
        name = _content(special.get("pad_token")) or ("<pad>" if self._number("<pad>") is not None else _CLIP_END)
        if self._number(name) is None:
            raise UserError(f"{self.path} has no token {name!r} to fill texts up with", remedy="restore its files")
        # A token that pads is one wherever a text spells it, as in transformers; its number stays what it is.
        self._tokenizer.add_special_tokens([name])
        self.padding = self._number(name)

    def _number(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def encode(self, texts: Sequence[str], length: int) -> Tokens:
        """Every text with the marks of its start and end, filled up or cut to `length` tokens.

        Of a text that is too long the end is cut, and what marks its end stays.
        """
        numbers = np.full((len(texts), length), self.padding, np.int32)
        counts, cut = [], []
        for row, text in enumerate(texts):
            self._tokenizer.no_truncation()
            found = self._tokenizer.encode(text).ids
            cut.append(max(0, len(found) - length))
            if cut[-1]:
                self._tokenizer.enable_truncation(length)
                found = self._tokenizer.encode(text).ids
            numbers[row, : len(found)] = found
            counts.append(len(found))
        return Tokens(numbers, np.arange(length) < np.array(counts)[:, None], tuple(cut))


def _package() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "prompts need the package tokenizers, which is not installed",
            remedy="pip install tokenizers (or qvdjax[text]), or give a file of text embeddings with --context",
        ) from None
    return tokenizers


def check_tokenizer_files(path: Path) -> tuple[str, ...]:
    """The files that say what the tokens of a folder are; UserError where they are not there."""
    for names in ((TOKENIZER,), (SENTENCEPIECE,), (VOCABULARY, MERGES)):
        if all((path / name).is_file() for name in names):
            return names
    raise UserError(
        f"{path} holds no tokenizer",
        remedy=f"download {TOKENIZER}, or {SENTENCEPIECE}, or {VOCABULARY} and {MERGES} into it",
    )


def _read(path: Path, package: Any) -> Any:
    """The tokenizer of a folder, in whichever layout it is."""
    name = check_tokenizer_files(path)[0]
    try:
        if name == TOKENIZER:
            return package.Tokenizer.from_file(str(path / TOKENIZER))
        if name == SENTENCEPIECE:
            extra = _json_of(path / "tokenizer_config.json").get("extra_ids", 100)
            return _from_sentencepiece(path / SENTENCEPIECE, extra, package)
        return _from_merges(path, package)
    except UserError:
        raise
    except Exception as error:  # which is what the package itself raises for a damaged file
        raise UserError(f"the tokenizer in {path} cannot be read ({error})", remedy="download it again") from error


def _from_sentencepiece(path: Path, extra: int, package: Any) -> Any:
    """T5's: pieces of the largest likelihood, each word's first with a mark of the space before it."""
    model = read_sentencepiece(path)
    names = [piece.text for piece in model.pieces]
    vocabulary = [(piece.text, piece.score) for piece in model.pieces]
    # Names of gaps, for T5's own training; they follow the file's pieces.
    gaps = [] if "<extra_id_0>" in names else [f"<extra_id_{i}>" for i in reversed(range(extra))]
    vocabulary += [(name, 0.0) for name in gaps]
    unknown = next((number for number, piece in enumerate(model.pieces) if piece.kind == UNKNOWN), None)
    if unknown is None or "</s>" not in names:
        raise UserError(f"{path} lacks the tokens of T5", remedy="download it again")
    tokenizer = package.Tokenizer(package.models.Unigram(vocabulary, unk_id=unknown, byte_fallback=False))
    if model.character_map:
        tokenizer.normalizer = package.normalizers.Precompiled(model.character_map)
    words, mark = package.pre_tokenizers.WhitespaceSplit(), package.pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.pre_tokenizer = package.pre_tokenizers.Sequence([words, mark])
    tokenizer.post_processor = package.processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", names.index("</s>"))]
    )
    tokenizer.add_special_tokens([piece.text for piece in model.pieces if piece.kind in (CONTROL, UNKNOWN)] + gaps)
    tokenizer.add_tokens([piece.text for piece in model.pieces if piece.kind == USER_DEFINED])
    return tokenizer


def _from_merges(path: Path, package: Any) -> Any:
    """CLIP's: lower case, words cut into bytes that are merged again in the order of the file."""
    bpe = package.models.BPE.from_file(
        str(path / VOCABULARY), str(path / MERGES), continuing_subword_prefix="", end_of_word_suffix="</w>",
        fuse_unk=False, unk_token=_CLIP_END,
    )  # fmt: skip
    tokenizer = package.Tokenizer(bpe)
    for name in (_CLIP_START, _CLIP_END):
        if tokenizer.token_to_id(name) is None:
            raise UserError(f"{path / VOCABULARY} lacks {name}", remedy="download it again")
    normal, before = package.normalizers, package.pre_tokenizers
    spaces = normal.Replace(package.Regex(r"\s+"), " ")
    tokenizer.normalizer = normal.Sequence([normal.NFC(), spaces, normal.Lowercase()])
    words = before.Split(package.Regex(_CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = before.Sequence([words, before.ByteLevel(add_prefix_space=False)])
    marks = [(name, tokenizer.token_to_id(name)) for name in (_CLIP_END, _CLIP_START)]
    tokenizer.post_processor = package.processors.RobertaProcessing(*marks, trim_offsets=False, add_prefix_space=False)
    tokenizer.add_special_tokens([_CLIP_START, _CLIP_END])
    return tokenizer


def _json_of(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """A token as it is spelled: a string, or an object with its `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
