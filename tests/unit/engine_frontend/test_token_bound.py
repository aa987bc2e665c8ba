"""Texts that cannot fit are refused before they are tokenized; nothing that fits ever is."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from slora.engine.v1 import engine_pb2
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import from_rpc_error
from services.engine.frontend.request import Chat, ChatMessage, ModelLimits
from services.engine.frontend.token_bound import TokenBound, token_bound
from services.engine.frontend.tokenizer import TextTokenizer, load_tokenizer
from services.engine.messages import Generate
from tests.fixtures.large_tokenizers import LONGEST_RUN, like_llama_3, like_qwen
from tests.unit.engine_frontend.conftest import byte_level_tokenizer, sentencepiece_tokenizer, word_tokenizer

# Decomposed letters, of which four become one; spaces of all kinds; what vocabularies lack.
PIECES = ["a\u0304\u0301", "\u1f82", "\u03b1\u0313\u0300\u0345", "q\u0323\u0307", "e\u0301", "ﬃ", "İ", "\u212a", "日"]
PIECES += [" ", "   ", "\n\t ", "\u00a0", "\u3000\u2028", "\x1c\x85", "▁", "\x00", "\ufffd", "🙂", "word", "12", "a.b"]
MOST_COMPOSED = 4
NO_ROOM = ModelLimits(vocab_size=10**6, max_model_len=1)


def changed(change: Callable[[Tokenizer], object], made: Callable[[], Tokenizer] = byte_level_tokenizer) -> Tokenizer:
    tokenizer = made()
    change(tokenizer)
    return tokenizer


def normalized(*steps: Any) -> Tokenizer:
    return changed(lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Sequence(list(steps))))


def cut(*steps: Any) -> Tokenizer:
    steps = (*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return changed(lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Sequence(list(steps))))


def adding(*tokens: AddedToken, normalizer: Any = None) -> Tokenizer:
    def change(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizer
        tokenizer.add_tokens(list(tokens))

    return changed(change)


def characters(**options: Any) -> Tokenizer:
    """Knows letters only."""
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    return Tokenizer(models.BPE({**letters, "<unk>": 26}, [], **options))


BOUND: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level_tokenizer,
    "byte fallback": sentencepiece_tokenizer,
    "composed": lambda: normalized(normalizers.NFC()),
    "made compatible": lambda: normalized(normalizers.NFKC(), normalizers.Lowercase()),
    "decomposed": lambda: normalized(normalizers.NFD(), normalizers.Prepend("x"), normalizers.Replace("a", "bc")),
    "cut": lambda: cut(pre_tokenizers.Split(Regex(r"\s+"), "isolated"), pre_tokenizers.Digits(individual_digits=True)),
    "an unknown a character": lambda: characters(unk_token="<unk>"),
    "a long added token": lambda: adding(AddedToken("word" * 30)),
    "an added token that grows": lambda: adding(AddedToken("ﬃ" * 9), normalizer=normalizers.NFKD()),
    "of Llama 3's shape": functools.cache(lambda: like_llama_3(fresh_draw())),
    "of Qwen's shape": functools.cache(lambda: like_qwen(fresh_draw())),
    "takes spaces before it": lambda: adding(AddedToken("<|left|>", lstrip=True)),
    "takes spaces behind it": lambda: adding(AddedToken("<|right|>", rstrip=True, normalized=False)),
}


def fresh_draw() -> random.Random:
    seed = random.randrange(2**32)
    print("seed", seed)
    return random.Random(seed)


def texts_of(tokenizer: Tokenizer, count: int = 60) -> list[str]:
    """The longest tokens many times over, and mixtures of these and of what is hard."""
    draw = fresh_draw()
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    alone = [[number] for number in range(tokenizer.get_vocab_size())]
    decoded = tokenizer.decode_batch(alone, skip_special_tokens=False)
    longest = sorted(decoded, key=len)[-8:]
    texts = [piece * 40 for piece in (*longest, *added, *PIECES)]
    texts += [" " * 500 + content + "\u3000 \n" * 200 for content in added]
    for _ in range(count):
        pool = draw.choices([*longest, *added, *PIECES], k=draw.randint(1, 6))
        texts.append("".join(draw.choices(pool, k=draw.randint(0, 80))))
        anything = [draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]) for _ in range(20)]
        texts.append("".join(map(chr, anything)))
    return texts


@pytest.mark.parametrize("name", BOUND)
def test_no_text_has_fewer_tokens_than_it_is_said_to_have(name: str) -> None:
    tokenizer = BOUND[name]()
    bound = token_bound(tokenizer)
    assert bound is not None
    for text in texts_of(tokenizer):
        num_tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
        assert bound.least_tokens(text, 10**9) <= num_tokens, repr(text)
        # Nor does it matter where counting stops.
        assert bound.least_tokens(text, num_tokens + 1) <= num_tokens, repr(text)


UNBOUND: dict[str, Callable[[], Tokenizer]] = {
    "words": word_tokenizer,
    "unknown characters are left out": characters,
    "unknown characters are one": lambda: characters(unk_token="<unk>", fuse_unk=True),
    "bytes that are missing": lambda: characters(byte_fallback=True),
    "bytes without their alphabet": lambda: changed(
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel()), characters
    ),
    "spaces are removed": lambda: cut(pre_tokenizers.Split(" ", "removed")),
    "spaces divide": lambda: cut(pre_tokenizers.Whitespace()),
    "spaces are stripped": lambda: normalized(normalizers.Strip()),
    "two become one": lambda: normalized(normalizers.Replace("  ", " ")),
    "any number becomes one": lambda: normalized(normalizers.Replace(Regex(" +"), " ")),
    "accents are stripped": lambda: normalized(normalizers.NFD(), normalizers.StripAccents()),
}


@pytest.mark.parametrize("name", UNBOUND)
def test_there_is_no_bound_where_a_token_may_stand_for_anything(name: str) -> None:
    assert token_bound(UNBOUND[name]()) is None


@pytest.mark.parametrize(
    ("name", "size", "characters"),
    [("of Llama 3's shape", 128_256, LONGEST_RUN), ("of Qwen's shape", 151_646, LONGEST_RUN * MOST_COMPOSED)],
)
def test_large_vocabularies_have_the_bound_of_their_longest_token(name: str, size: int, characters: int) -> None:
    tokenizer = BOUND[name]()
    assert tokenizer.get_vocab_size() == size
    assert token_bound(tokenizer) == TokenBound(characters)
    # It is reached, so that nothing lower would do.
    assert len(tokenizer.encode(" " * LONGEST_RUN, add_special_tokens=False).ids) == 1


def test_space_beside_tokens_that_take_it_is_not_counted() -> None:
    tokenizer = BOUND["takes spaces before it"]()
    text = " \n\u3000" * 10**5 + "<|left|>"
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) == 1
    bound = token_bound(tokenizer)
    assert bound is not None
    assert bound.least_tokens(text, 10) == 1
    assert bound.least_tokens("x " * 10**6, 10) >= 10


@pytest.mark.parametrize(("num_characters", "tokens"), [(0, 0), (1, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_a_token_begun_is_a_token(num_characters: int, tokens: int) -> None:
    assert TokenBound(8).least_tokens("x" * num_characters, 100) == tokens
    assert TokenBound(8, counts_space=False).least_tokens("x" * num_characters, 100) == tokens


def test_checkpoints_have_a_bound(checkpoints: dict[str, Path]) -> None:
    for kind, checkpoint in checkpoints.items():
        tokenizer = load_tokenizer(checkpoint)
        if kind == "words":
            assert tokenizer.encode("x" * 1000, NO_ROOM)
            continue
        with pytest.raises(SloraError) as caught:
            tokenizer.encode("x" * 1000, NO_ROOM)
        assert caught.value.reason is Reason.PROMPT_TOO_LONG


class NeverAsked:
    """In the place of the library's tokenizer: to ask it anything is to fail."""


def never_tokenizing(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_tokenizer", NeverAsked())


LARGEST = 16 * 2**20 - 100


@pytest.mark.parametrize("character", ["x", " "])
async def test_a_text_of_16_mib_is_refused_without_being_tokenized(
    engine: Any, monkeypatch: pytest.MonkeyPatch, character: str
) -> None:
    async def refusal(text: str) -> SloraError:
        call = engine.stub.Generate(engine_pb2.GenerateRequest(request_id="test", prompt={"text": text}))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        return from_rpc_error(caught.value, Reason.INTERNAL)

    tokenized = await refusal("日" * 255)
    never_tokenizing(engine.tokenizer, monkeypatch)
    error = await refusal(character * LARGEST)
    assert error.reason is tokenized.reason is Reason.PROMPT_TOO_LONG
    assert error.metadata.keys() == tokenized.metadata.keys()
    assert int(error.metadata["num_prompt_tokens"]) > 255
    assert error.message.endswith("room for 256: at most 255 prompt tokens can be taken")
    assert not engine.core.sent


async def test_so_is_a_conversation(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(checkpoints["byte-level"])
    monkeypatch.setattr(tokenizer._chat_template, "render", lambda chat: chat.messages[0].content)
    never_tokenizing(tokenizer, monkeypatch)
    with pytest.raises(SloraError) as caught:
        await tokenizer.encode_chat_async(Chat((ChatMessage("user", "x" * LARGEST),)), ModelLimits(600, 256))
    assert caught.value.reason is Reason.PROMPT_TOO_LONG


async def test_the_longest_text_that_fits_is_served(engine: Any) -> None:
    texts = {token_id: engine.tokenizer.decode([token_id]) for token_id in engine.tokenizer.tokens}
    longest = max(texts.values(), key=len)
    text = longest * 254  # and BOS
    assert len(engine.tokenizer.encode(text)) == 255
    call = engine.stub.Generate(engine_pb2.GenerateRequest(request_id="test", prompt={"text": text}))
    assert len((await engine.core.take(Generate)).prompt_ids) == 255
    call.cancel()
