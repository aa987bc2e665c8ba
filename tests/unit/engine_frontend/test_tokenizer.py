from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from services.engine.frontend import tokenizer as tokenizer_module
from services.engine.frontend.tokenizer import TextTokenizer, TokenizerFileError, load_tokenizer

KINDS = [
    "byte-level",
    "extra-special",
    "sentencepiece",
    "llama-class",
    "llama-class-legacy",
    "llama-class-mistral",
    "llama-class-bytes",
    "words",
]
ALPHABET = "abcdefg XYZ  \n\té日本🙂нмa.,!?1239<>|'\"\u0301\ufffd▁"
MARKERS = ["<s>", "</s>", "<|begin|>", "<|end|>", "<tool call>", "<|im|>", "<pad>", "é日", "<unk>", "[BOS]"]


def random_texts(count: int) -> list[str]:
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    texts = ["", " ", "  two leading", " one", "trailing  ", "Hello world", "a<s>b", " <s> b", "<s>", "\n"]
    for _ in range(count):
        parts = ["".join(draw.choices(ALPHABET, k=draw.randint(0, 12))) for _ in range(draw.randint(1, 5))]
        texts.append("".join(part + draw.choice([*MARKERS, "", "", "", " "]) for part in parts))
    return texts


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> tuple[TextTokenizer, object]:
    checkpoint = checkpoints[request.param]
    return load_tokenizer(checkpoint), AutoTokenizer.from_pretrained(checkpoint)


def test_encoding_equals_transformers(pair: tuple[TextTokenizer, object]) -> None:
    ours, reference = pair
    for text in random_texts(150):
        assert ours.encode(text) == reference(text)["input_ids"], repr(text)


def test_decoding_equals_transformers(pair: tuple[TextTokenizer, object]) -> None:
    ours, reference = pair
    for text in random_texts(60):
        ids = reference(text)["input_ids"]
        detokenizer = ours.detokenizer()
        decoded = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        assert decoded == reference.decode(ids, skip_special_tokens=True), repr(text)


def test_bos_comes_from_the_post_processor(checkpoints: dict[str, Path]) -> None:
    assert load_tokenizer(checkpoints["byte-level"]).encode("Hello")[0] == 0
    assert load_tokenizer(checkpoints["sentencepiece"]).encode("Hello")[0] == 1


def test_truncation_and_padding_in_the_file_do_not_apply(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    content = json.loads((checkpoints["byte-level"] / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<|end|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ids = load_tokenizer(tmp_path).encode("Hello world, this is longer than three tokens")
    assert 3 < len(ids) < 64


async def test_long_texts_leave_the_event_loop_free(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(checkpoints["byte-level"])
    text = "The adapters share one base model. " * 6000
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticker = asyncio.create_task(tick())
    ids = await tokenizer.encode_async(text)
    ticker.cancel()
    assert ids == tokenizer.encode(text)
    assert ticks >= 5  # tens of milliseconds of work; on the loop there would be none

    monkeypatch.setattr(tokenizer_module, "INLINE_CHARACTERS", 10**9)
    assert await tokenizer.encode_async(text) == ids


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": "{"}, "is not a tokenizer"),
        ({"tokenizer.json": None, "tokenizer_config.json": "nonsense"}, "is not JSON"),
        ({"tokenizer.json": None, "tokenizer_config.json": "[]"}, "no JSON object"),
        ({"tokenizer.json": None, "tokenizer_config.json": '{"added_tokens_decoder": {"5": {}}}'}, "malformed"),
    ],
)
def test_unreadable_files_are_named(
    tmp_path: Path, checkpoints: dict[str, Path], files: dict[str, str | None], complaint: str
) -> None:
    for name, content in files.items():
        if content is None:
            content = (checkpoints["byte-level"] / name).read_text()
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerFileError, match=complaint):
        load_tokenizer(tmp_path)
