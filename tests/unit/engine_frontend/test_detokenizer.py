from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from services.engine.frontend import detokenizer as detokenizer_module
from services.engine.frontend.detokenizer import ByteFallbackTexts, ByteLevelTexts, WindowTexts
from services.engine.frontend.tokenizer import TextTokenizer, load_tokenizer

EXACT = {
    "byte-level": ByteLevelTexts,
    "extra-special": ByteLevelTexts,
    "sentencepiece": ByteFallbackTexts,
    "llama-class": ByteFallbackTexts,
    "words": WindowTexts,
}


# A longer run of byte tokens is not read as a whole; see test_a_long_run_of_byte_tokens_streams.
LONGEST_WHOLE_RUN = detokenizer_module.MAX_HELD_BYTE_TOKENS - 2


@pytest.fixture(scope="module", params=list(EXACT))
def tokenizer(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> TextTokenizer:
    tokenizer = load_tokenizer(checkpoints[request.param])
    assert type(tokenizer._texts) is EXACT[request.param]
    return tokenizer


def pieces(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def whole(tokenizer: TextTokenizer, ids: list[int]) -> str:
    inner: Tokenizer = tokenizer._tokenizer
    return inner.decode(ids, skip_special_tokens=True)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole(tokenizer: TextTokenizer, data: st.DataObject) -> None:
    # Any ids: special tokens, bytes that are no UTF-8, ids that no token has.
    everything = st.integers(0, max(tokenizer.tokens) + 5)
    small = st.integers(0, 270)  # mostly single bytes in these vocabularies: broken characters abound
    ids = data.draw(st.lists(st.one_of(everything, small), max_size=60))
    assert "".join(pieces(tokenizer, ids)) == whole(tokenizer, ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40), cut=st.integers(0, 200))
def test_text_survives_and_characters_stay_whole(tokenizer: TextTokenizer, text: str, cut: int) -> None:
    # A cut in the middle of a character leaves its bytes behind, as a generation that ends at max_tokens does.
    ids = tokenizer.encode(text)[: min(cut, LONGEST_WHOLE_RUN) + 1]
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == whole(tokenizer, ids)
    if "\ufffd" not in text and tokenizer.tokens.get(ids[-1] if ids else -1):
        assert not any("\ufffd" in part for part in parts[:-1])


def test_half_a_character_is_never_shown(checkpoints: dict[str, Path]) -> None:
    for kind in ("byte-level", "sentencepiece"):
        tokenizer = load_tokenizer(checkpoints[kind])
        ids = tokenizer.encode("🙂日本 ok")
        parts = pieces(tokenizer, ids)
        assert "".join(parts).strip() == "🙂日本 ok"
        assert "\ufffd" not in "".join(parts)
        assert sum(part == "" for part in parts) >= 3  # the emoji alone takes several tokens


def test_text_comes_with_the_token_that_completes_it(checkpoints: dict[str, Path]) -> None:
    """Nothing is held back without need: ordinary text comes with its own token."""
    for kind in ("byte-level", "sentencepiece", "words"):
        tokenizer = load_tokenizer(checkpoints[kind])
        ids = tokenizer.encode("The adapters share one base model,")
        if kind != "words":
            ids = ids[1:]
        parts = pieces(tokenizer, ids)
        assert parts[-1] == ""
        assert all(parts[:-1]), parts


def test_a_long_run_of_byte_tokens_streams(checkpoints: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(checkpoints["sentencepiece"])
    text = "ខ្ញុំស្រឡាញ់ភាសាខ្មែរ" * 10  # not one character of it is in the vocabulary
    ids = tokenizer.encode(text)[2:]
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == text
    # What was shown stays, where decoding all at once would lose it to a character that is cut at the end.
    cut = "".join(pieces(tokenizer, ids[:-1]))
    assert whole(tokenizer, ids[:-1]) == "\ufffd" * len(ids[:-1])
    assert cut.rstrip("\ufffd") == text[: len(cut.rstrip("\ufffd"))]
    assert len(cut.rstrip("\ufffd")) > len(text) / 2
    longest_silence = max(len(gap) for gap in "".join("x" if part else "." for part in parts).split("x"))
    assert longest_silence <= detokenizer_module.MAX_HELD_BYTE_TOKENS


def test_a_broken_run_streams_at_once(checkpoints: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(checkpoints["sentencepiece"])
    byte = {token: i for i, token in tokenizer.tokens.items()}
    ids = [byte["<0xE2>"], byte["<0x28>"], byte["<0x41>"]]
    assert pieces(tokenizer, ids) == ["", "\ufffd\ufffd", "\ufffd", ""]


def test_token_text(checkpoints: dict[str, Path]) -> None:
    spm = load_tokenizer(checkpoints["sentencepiece"])
    ids = {token: i for i, token in spm.tokens.items()}
    assert spm.token_text(ids["<0x0A>"]) == "\n"
    assert spm.token_text(ids["<0xE2>"]) == ""
    assert spm.token_text(ids["</s>"]) == "</s>"
    words = [token for token in ids if token.startswith("▁") and len(token) > 3]
    assert words
    assert all(spm.token_text(ids[word]) == " " + word[1:] for word in words)
    assert spm.token_text(10**6) == ""
    level = load_tokenizer(checkpoints["byte-level"])
    ids = {token: i for i, token in level.tokens.items()}
    assert level.token_text(ids["Ġ"]) == " "
    assert level.token_text(ids["Ã"]) == ""
    assert level.token_text(ids["é日"]) == "é日"


def test_cost_is_linear(tokenizer: TextTokenizer) -> None:
    def seconds(count: int) -> float:
        ids = [(n * 7919) % len(tokenizer.tokens) for n in range(count)]
        best = 1e9
        for _ in range(3):
            start = time.thread_time()
            pieces(tokenizer, ids)
            best = min(best, time.thread_time() - start)
        return best

    seconds(2000)
    assert seconds(40_000) < 40 * seconds(4_000)  # ten times the tokens; a quadratic one takes 100 times as long


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_window_reads_other_decoders_too(checkpoints: dict[str, Path], data: st.DataObject) -> None:
    """The general way agrees with the exact ones wherever the text is real text."""
    kind = data.draw(st.sampled_from(["byte-level", "sentencepiece"]))
    tokenizer = load_cached(checkpoints[kind])
    ids = tokenizer.encode(data.draw(st.text(max_size=30)))
    general = WindowTexts(tokenizer).detokenizer()
    assert "".join(map(general.push, ids)) + general.flush() == whole(tokenizer, ids)


CACHE: dict[Path, TextTokenizer] = {}


def load_cached(path: Path) -> TextTokenizer:
    if path not in CACHE:
        CACHE[path] = load_tokenizer(path)
    return CACHE[path]
