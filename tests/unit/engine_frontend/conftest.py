"""Checkpoint directories with small but real tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The adapters share one base model, and each of them answers in its own voice.",
    "Ein Wort gibt das andere; so größer die Stapel, desto schneller geht es: äöüß.",
    "数字と文字が混ざった文章もあります。🙂 The end… or is it? 1234567890",
    "def shrink(x, a):\n    return x @ a.T\n\n\tprint('done')  # two  spaces",
    "Привет, мир! Как дела? नमस्ते दुनिया 👩‍👩‍👧‍👦 naïve café coöperate",
] * 4


def byte_level_tokenizer(vocab_size: int = 600) -> Tokenizer:
    """Like Llama 3's: byte-level BPE, BOS from the post-processor, special and other added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool call>", "é日"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
    )
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """Like Llama 2's tokenizer.json: BPE over ▁, byte fallback, a space put before the text and taken off again."""
    sample = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    sample.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False)
    latin = ["".join(c for c in line if ord(c) < 0x250) for line in CORPUS]
    sample.train_from_iterator(latin, trainer)
    trained = json.loads(sample.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    model = models.BPE(trained["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def word_tokenizer() -> Tokenizer:
    """One that no fast path knows: whole words, joined by spaces."""
    words = ["[UNK]", "[BOS]", *sorted({word for line in CORPUS for word in line.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[BOS]"])
    return tokenizer


def write_checkpoint(
    directory: Path, tokenizer: Tokenizer, config: dict[str, object], model_type: str = "llama"
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return directory


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories by kind of tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    fast: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>"}
    llama: dict[str, object] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {
        "byte-level": write_checkpoint(root / "bytes", byte_level_tokenizer(), {**fast, "eos_token": "<|end|>"}),
        "extra-special": write_checkpoint(
            root / "extra",
            byte_level_tokenizer(),
            {**fast, "eos_token": "<tool call>", "additional_special_tokens": ["<|im|>"], "pad_token": "<pad>"},
        ),
        "sentencepiece": write_checkpoint(
            root / "spm", sentencepiece_tokenizer(), {**llama, "tokenizer_class": "PreTrainedTokenizerFast"}
        ),
        "llama-class": write_checkpoint(
            root / "llama", sentencepiece_tokenizer(), {**llama, "tokenizer_class": "LlamaTokenizer"}
        ),
        "llama-class-legacy": write_checkpoint(
            root / "legacy", sentencepiece_tokenizer(), {**llama, "tokenizer_class": "LlamaTokenizer", "legacy": True}
        ),
        "llama-class-mistral": write_checkpoint(
            root / "mistral", sentencepiece_tokenizer(), {**llama, "tokenizer_class": "LlamaTokenizer"}, "mistral"
        ),
        "llama-class-bytes": write_checkpoint(
            root / "llama3", byte_level_tokenizer(), {**fast, "tokenizer_class": "LlamaTokenizerFast"}
        ),
        "words": write_checkpoint(root / "words", word_tokenizer(), {"tokenizer_class": "PreTrainedTokenizerFast"}),
    }
