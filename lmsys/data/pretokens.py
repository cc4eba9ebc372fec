r"""Pre-tokens: GPT-2's pattern, the faster cuts that agree with it, special tokens, and files cut into chunks.

Text is first cut into *pieces*, `\s?\S+|\s+(?!\S)`, by the standard library's `re`; GPT-2's pattern, three times
slower, sees each distinct piece once. This changes nothing: a match of GPT-2's pattern is whitespace only, or
non-whitespace after at most one space, so a pre-token always ends where whitespace follows non-whitespace; a run of
whitespace before non-whitespace is matched without its last character; and the lookahead, the only part of the pattern
that sees beyond its match, finds at the end of a piece what allows the same match as in the whole text.
"""

from __future__ import annotations

import os
import re
import string
import sys
from collections.abc import Sequence
from pathlib import Path

import regex

from lmsys.config import require

PRETOKEN = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# What `\s` matches in PRETOKEN: Unicode's White_Space. `\s` of the standard library also matches \x1c to \x1f.
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
PIECE = re.compile(f"[{WHITESPACE}]?[^{WHITESPACE}]+|[{WHITESPACE}]+(?![^{WHITESPACE}])")


# In UTF-8: before ASCII whitespace that follows a character other than whitespace, with no width.
_NOT_AFTER = b"".join(b"(?<!%s)" % re.escape(character.encode()) for character in WHITESPACE)
CUT = re.compile(rb"(?<=[\x00-\xff])" + _NOT_AFTER + rb"(?=[\t-\r ])")
WIDE_SPACE = re.compile(b"|".join(character.encode() for character in WHITESPACE if not character.isascii()))

CHUNK_BYTES = 2**20  # text that one process holds at a time
MAX_PIECES = 2**18  # entries of an encoding cache, and of a counter of pieces; about 50 MiB
MAX_IDS = sys.maxunicode + 1
_SEARCH_BYTES = 2**16  # how far a cut may lie behind its place for the sake of a special token


def split_piece(piece: str) -> Sequence[str]:
    """PRETOKEN.findall(piece), without the pattern where a piece is an ASCII word and perhaps punctuation after it."""
    if piece.isascii():
        word = piece.rstrip(string.punctuation)
        if word[word[:1] == " " :].isalpha():
            return (word,) if len(word) == len(piece) else (word, piece[len(word) :])
    return PRETOKEN.findall(piece)


# --- Special tokens ---


def check_special_tokens(special_tokens: Sequence[str] | None) -> tuple[str, ...]:
    is_string = isinstance(special_tokens, str)
    require(not is_string, f"special_tokens is the string {special_tokens!r}; give a list of strings")
    special_tokens = tuple(special_tokens or ())
    for token in special_tokens:
        require(isinstance(token, str) and token != "", f"special token {token!r} is not a non-empty string")
        require(is_encodable(token), f"special token {token!r} has a lone surrogate, which UTF-8 cannot hold")
    require(len(set(special_tokens)) == len(special_tokens), f"special_tokens {list(special_tokens)} has a token twice")
    return special_tokens


def is_encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def special_pattern(special_tokens: Sequence[str], kind: type = str) -> re.Pattern | None:
    """Matches a special token, the longest where several begin; None where there are none."""
    if not special_tokens:
        return None
    pattern = "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True)))
    return re.compile(pattern if kind is str else pattern.encode())


# --- Cutting files into chunks ---


def find_chunk_boundaries(
    path: str | os.PathLike, *, chunk_bytes: int = CHUNK_BYTES, special_tokens: Sequence[str] = ()
) -> list[int]:
    """Byte offsets that cut a UTF-8 file into chunks of about chunk_bytes whose tokens are those of the whole file.

    A cut lies at the start of a special token or, where none comes within 64 KiB, before ASCII whitespace that follows
    a character other than whitespace, where a pre-token always ends (see the top of the module). No occurrence of a
    special token lies across a cut. Text without such a place stays one chunk. Offsets go from 0 to the file's size,
    strictly increasing. ValueError: the file is missing or empty.
    """
    require(chunk_bytes >= 1, f"chunk_bytes is {chunk_bytes}; it must be at least 1")
    try:
        size = os.path.getsize(path)
    except FileNotFoundError:
        raise ValueError(f"no text file at {Path(path).resolve()}") from None
    with open(path, "rb") as file:
        require(size > 0, f"{path}: the file is empty")
        special = [token.encode() for token in special_tokens]
        longest = max(map(len, special), default=0)
        pattern = special_pattern(special_tokens, bytes)
        bounds = [0]
        target = chunk_bytes
        while target < size:
            start = max(0, target - max(longest, 3))  # 3 bytes: the longest whitespace character
            file.seek(start)
            end = target - start + _SEARCH_BYTES
            window = file.read(end + longest)
            places = (m.start() for cuts in (pattern, CUT) if cuts for m in cuts.finditer(window, target - start))
            cut = next((at for at in places if at < end and not inside_special(window, at, special)), None)
            if cut is None:
                target += _SEARCH_BYTES
            else:
                bounds.append(start + cut)
                target = start + cut + chunk_bytes
    return [*bounds, size]


def inside_special(text, at: int, special_tokens: Sequence) -> bool:
    """Whether a special token occurs across the place `at` of a str or bytes."""
    return any(text.find(token, max(0, at - len(token) + 1), at + len(token) - 1) >= 0 for token in special_tokens)


def decode_utf8(data: bytes, path: str | os.PathLike, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte 0x{data[error.start]:02x} at offset {offset + error.start} ({error.reason})"
        raise ValueError(f"{path}: not UTF-8 text: {what}") from None
