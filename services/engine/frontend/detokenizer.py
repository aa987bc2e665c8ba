"""Token ids to text, one token at a time, without ever showing half a character.

The texts that `push` and `flush` return join to exactly what decoding all ids at once gives (special tokens skipped),
also where a model draws bytes that are no UTF-8. Byte-level BPE and SentencePiece with byte fallback, which is what
Llama, Mistral and Qwen use, are decoded from a table of token bytes in constant time a token; any other decoder goes
through a short window of tokens that the tokenizer's own decoder reads again.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"

MAX_HELD_BYTE_TOKENS = 64
"""A run of byte tokens is read as a whole: one wrong byte turns all of it into U+FFFD. So text is held back until the
run ends; after this many (21 CJK characters) what is complete is shown all the same, for a script that the vocabulary
lacks would otherwise not stream at all."""

MAX_HELD_WINDOW_TOKENS = 16
"""A character has at most 4 bytes, so more tokens than this that end in U+FFFD really mean U+FFFD."""


class Detokenizer(Protocol):
    """The text of one sequence, as its tokens come."""

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` came too; may be empty. Ids without a token are ignored."""

    def flush(self) -> str:
        """The rest, at the end of the sequence; incomplete characters become U+FFFD."""


class Vocabulary(Protocol):
    """What detokenizing needs to know of a tokenizer; each special token is marked so by its id."""

    @property
    def tokens(self) -> Mapping[int, str]:
        """Every token by its id, as the tokenizer writes it (`Ġthe`, `▁the`, `<0x0A>`)."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that decoding skips."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens kept."""


class TokenTexts(Protocol):
    """How one vocabulary's tokens become text; shared by all sequences."""

    def detokenizer(self) -> Detokenizer:
        """A detokenizer for a new sequence."""

    def text(self, token_id: int) -> str:
        """The token's own text; empty if it is part of a character or not in the vocabulary."""


def token_texts(vocabulary: Vocabulary, decoder: Mapping[str, Any] | None) -> TokenTexts:
    """The fastest exact reading of a tokenizer's `decoder` (its JSON in tokenizer.json; None: tokens and spaces)."""
    steps = _steps(decoder)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteLevelTexts(vocabulary)
    replaces = [step for step in steps if step["type"] == "Replace"]
    rest = [step for step in steps if step["type"] != "Replace"]
    in_order = steps == replaces + rest and all("String" in step["pattern"] for step in replaces)
    if in_order and [step["type"] for step in rest[:2]] == ["ByteFallback", "Fuse"] and len(rest) <= 3:
        strip: Mapping[str, Any] = (
            rest[2] if len(rest) == 3 else {"type": "Strip", "content": " ", "start": 0, "stop": 0}
        )
        if strip["type"] == "Strip" and not strip["stop"]:
            pairs = [(step["pattern"]["String"], step["content"]) for step in replaces]
            return ByteFallbackTexts(vocabulary, pairs, strip["content"], strip["start"])
    return WindowTexts(vocabulary)


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


# Byte-level BPE ------------------------------------------------------------------------------------------------------


def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class ByteLevelTexts:
    """Tokens of byte-level BPE: each stands for some bytes, all bytes together are UTF-8."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        alphabet = byte_of_character()

        def token_bytes(token: str) -> bytes:
            try:
                return bytes([alphabet[character] for character in token])
            except KeyError:  # an added token, written as it is
                return token.encode()

        self._bytes = {token_id: token_bytes(token) for token_id, token in vocabulary.tokens.items()}
        self._shown = {i: b for i, b in self._bytes.items() if i not in vocabulary.special_ids}

    def detokenizer(self) -> Detokenizer:
        """A detokenizer for a new sequence."""
        return _ByteLevelDetokenizer(self._shown)

    def text(self, token_id: int) -> str:
        """The token's own text; empty if it is part of a character or not in the vocabulary."""
        return _strict_text(self._bytes.get(token_id, b""))


class _ByteLevelDetokenizer:
    def __init__(self, shown: Mapping[int, bytes]) -> None:
        self._bytes_of = shown.get
        self._decode: Callable[..., str] = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        return self._decode(self._bytes_of(token_id, b""))

    def flush(self) -> str:
        return self._decode(b"", True)


# SentencePiece with byte fallback ------------------------------------------------------------------------------------


class ByteFallbackTexts:
    """Tokens of a SentencePiece vocabulary: a token is text, or one byte (`<0x0A>`) of a character it lacks."""

    def __init__(
        self, vocabulary: Vocabulary, replaces: Iterable[tuple[str, str]], strip_content: str, strip_count: int
    ) -> None:
        pairs = tuple(replaces)
        self._pieces = {token_id: _piece(token, pairs) for token_id, token in vocabulary.tokens.items()}
        self._shown = {i: p for i, p in self._pieces.items() if i not in vocabulary.special_ids}
        self._strip = (strip_content, strip_count)

    def detokenizer(self) -> Detokenizer:
        """A detokenizer for a new sequence."""
        return _ByteFallbackDetokenizer(self._shown, *self._strip)

    def text(self, token_id: int) -> str:
        """The token's own text; empty if it is part of a character or not in the vocabulary."""
        piece = self._pieces.get(token_id, "")
        return piece if isinstance(piece, str) else _strict_text(bytes([piece]))


def _piece(token: str, replaces: Iterable[tuple[str, str]]) -> str | int:
    for old, new in replaces:
        token = token.replace(old, new)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return token
    return token


class _ByteFallbackDetokenizer:
    def __init__(self, shown: Mapping[int, str | int], strip_content: str, strip_count: int) -> None:
        self._piece_of = shown.get
        self._strip_content = strip_content
        self._strip_left = strip_count  # leading characters that may still have to go
        self._run = bytearray()  # bytes of the present run of byte tokens that are not shown yet
        self._run_is_broken = False

    def push(self, token_id: int) -> str:
        piece = self._piece_of(token_id)
        if piece is None:
            return ""
        if isinstance(piece, int):
            text = self._push_byte(piece)
        else:
            text = self._end_run() + piece if self._run or self._run_is_broken else piece
        return self._strip(text) if self._strip_left else text

    def flush(self) -> str:
        return self._strip(self._end_run())

    def _push_byte(self, byte: int) -> str:
        if self._run_is_broken:
            return REPLACEMENT
        run = self._run
        run.append(byte)
        if byte < 0x80 and len(run) == 1:
            return ""
        try:
            text, complete = run.decode(), len(run)
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                self._run_is_broken = True
                text = REPLACEMENT * len(run)
                run.clear()
                return text
            complete = error.start
            text = run[:complete].decode()
        if len(run) < MAX_HELD_BYTE_TOKENS:
            return ""
        del run[:complete]
        return text

    def _end_run(self) -> str:
        run, self._run_is_broken = self._run, False
        if not run:
            return ""
        try:
            text = run.decode()
        except UnicodeDecodeError:
            text = REPLACEMENT * len(run)
        run.clear()
        return text

    def _strip(self, text: str) -> str:
        while text and self._strip_left:
            if text[0] != self._strip_content:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


# Any other decoder ---------------------------------------------------------------------------------------------------


class WindowTexts:
    """Tokens whose decoder is a black box that may look at neighbours (joining spaces, word pieces)."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def detokenizer(self) -> Detokenizer:
        """A detokenizer for a new sequence."""
        return _WindowDetokenizer(self._vocabulary)

    def text(self, token_id: int) -> str:
        """The token's own text; empty if it is part of a character or not in the vocabulary."""
        text = self._vocabulary.decode([token_id])
        return "" if REPLACEMENT in text else text


class _WindowDetokenizer:
    """Decodes the tokens shown last with the new ones behind them, and shows what is longer now.

    The tokens shown last give the decoder its context (is this the first word?); older ones are forgotten.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokens = vocabulary.tokens
        self._special_ids = vocabulary.special_ids
        self._decode = vocabulary.decode
        self._window: list[int] = []
        self._num_shown = 0  # leading ids of the window whose text was returned
        self._shown = ""

    def push(self, token_id: int) -> str:
        if token_id in self._special_ids or token_id not in self._tokens:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        is_certain = len(text) > len(self._shown) and not text.endswith(REPLACEMENT)
        if is_certain or len(self._window) - self._num_shown >= MAX_HELD_WINDOW_TOKENS:
            return self._show(text)
        return ""

    def flush(self) -> str:
        return self._show(self._decode(self._window)) if self._window else ""

    def _show(self, text: str) -> str:
        fresh = text[len(self._shown) :]
        del self._window[: self._num_shown]
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window) if self._window else ""
        return fresh


def _strict_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""
