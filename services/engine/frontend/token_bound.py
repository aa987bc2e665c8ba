"""How few tokens a text can become, told without tokenizing it: what cannot fit a model is refused for nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models

from services.engine.frontend.detokenizer import byte_of_character

_FEWER_CHARACTERS = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Lowercase": 1, "Prepend": 1, "ByteLevel": 1}
"""So many characters at most become one. No character is decomposed into more than four, so none is composed of more
either (UAX 15)."""

_KEEPING = ("ByteLevel", "Metaspace", "Digits", "Punctuation", "Split", "UnicodeScripts")
"""Ways to cut a text that lose nothing, unless they say that what they cut at is removed."""

_CHUNK = 2**16


@dataclass(frozen=True, slots=True)
class TokenBound:
    """No token stands for more than so many characters; without space, where some take in what lies beside them."""

    characters: int
    counts_space: bool = True

    def least_tokens(self, text: str, enough: int) -> int:
        """`text` has so many tokens or more. Counts no further than `enough`."""
        if self.counts_space:
            return -(-len(text) // self.characters)
        counted = 0
        for begin in range(0, len(text), _CHUNK):
            counted += sum(map(len, text[begin : begin + _CHUNK].split()))
            if counted >= enough * self.characters:
                break
        return -(-counted // self.characters)


def token_bound(tokenizer: Tokenizer) -> TokenBound | None:
    """None where a single token may stand for any number of characters, or it is not known that none does."""
    shrinking = _shrinking(tokenizer)
    if shrinking is None or not _keeps_all(tokenizer) or not _knows_all(tokenizer):
        return None
    added = tokenizer.get_added_tokens_decoder().values()
    written = [token.content for token in added]
    normalized = list(tokenizer.get_vocab(with_added_tokens=False))
    if tokenizer.normalizer is not None:
        normalized += [tokenizer.normalizer.normalize_str(content) for content in written]
    longest = max(shrinking * max(map(len, normalized), default=1), *map(len, written), 1)
    return TokenBound(longest, not any(token.lstrip or token.rstrip for token in added))


def _shrinking(tokenizer: Tokenizer) -> int | None:
    """How many characters normalizing may make one; None if there is no telling."""
    shrinking = 1
    for step in _steps(tokenizer.normalizer, "normalizers"):
        if step["type"] == "Replace":
            replaced = step["pattern"].get("String")
            if replaced is None or len(step["content"]) < len(replaced):
                return None
        elif step["type"] in _FEWER_CHARACTERS:
            shrinking *= _FEWER_CHARACTERS[step["type"]]
        else:
            return None
    return shrinking


def _keeps_all(tokenizer: Tokenizer) -> bool:
    """Whether all of a normalized text reaches the model."""
    steps = _steps(tokenizer.pre_tokenizer, "pretokenizers")
    return all(step["type"] in _KEEPING and step.get("behavior") != "Removed" for step in steps)


def _knows_all(tokenizer: Tokenizer) -> bool:
    """Whether the model has a token for everything, so that nothing is left out and no run of characters is one token
    that stands for the unknown."""
    model = tokenizer.model
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    steps = [*_steps(tokenizer.normalizer, "normalizers"), *_steps(tokenizer.pre_tokenizer, "pretokenizers")]
    if any(step["type"] == "ByteLevel" for step in steps) and vocabulary.keys() >= byte_of_character().keys():
        return True
    if model.byte_fallback and vocabulary.keys() >= {f"<0x{byte:02X}>" for byte in range(256)}:
        return True
    return model.unk_token is not None and not model.fuse_unk


def _steps(part: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer as its JSON has them, those of sequences one by one."""

    def flat(step: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        if step["type"] == "Sequence":
            for inner in step[name]:
                yield from flat(inner)
        else:
            yield step

    if part is not None:
        yield from flat(json.loads(part.__getstate__()))
