"""Small but real tokenizers, and an engine's frontend whose core is played by the test."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import msgspec
import pytest
from prometheus_client import generate_latest
from slora.engine.v1 import engine_pb2_grpc
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from services.common.errors import SloraError
from services.common.grpc_client import open_channel
from services.common.grpc_server import GrpcServer
from services.common.tracing import NO_TRACING, Tracing
from services.engine.frontend.metrics import EngineMetrics
from services.engine.frontend.serving import Frontend
from services.engine.frontend.tokenizer import TextTokenizer, load_tokenizer
from services.engine.messages import (
    CoreLoad,
    CoreReady,
    StepReport,
    ToCore,
    TokenEvent,
    encoder,
    to_core_decoder,
    to_frontend_decoder,
)
from services.engine.servicer import SERVICE_NAME, EngineServicer

T = TypeVar("T")

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


class FakeCore:
    """Stands where CoreClient does, in this process: a test reads what was sent and reports steps by hand."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self.sent: list[ToCore] = []
        self.load = CoreLoad(num_free_pages=100)
        self.disconnected = False
        self.room_error: SloraError | None = None
        self._arrived = asyncio.Event()

    def send(self, message: ToCore) -> None:
        self.sent.append(to_core_decoder.decode(encoder.encode(message)))
        self._arrived.set()

    def check_room(self) -> None:
        if self.room_error is not None:
            raise self.room_error

    def disconnect(self) -> None:
        self.disconnected = True
        self.frontend.core_lost("given up", expected=False)

    def become_ready(self, vocab_size: int = 600, max_model_len: int = 256) -> None:
        ready = CoreReady(num_pages=100, max_model_len=max_model_len, max_running=8, vocab_size=vocab_size)
        self.frontend.core_ready(self, ready)  # type: ignore[arg-type]

    async def take(self, kind: type[T], timeout: float = 20.0) -> T:
        """The next message, which must be a `kind`."""
        async with asyncio.timeout(timeout):
            while not self.sent:
                self._arrived.clear()
                await self._arrived.wait()
        message = self.sent.pop(0)
        assert isinstance(message, kind), message
        return message

    def report(self, *tokens: TokenEvent, **changes: Any) -> None:
        """A step in which these tokens came."""
        self.load = msgspec.structs.replace(self.load, num_steps_total=self.load.num_steps_total + 1)
        report = StepReport(load=changes.pop("load", self.load), tokens=list(tokens), **changes)
        self.frontend.core_report(to_frontend_decoder.decode(encoder.encode(report)))  # type: ignore[arg-type]

    def tokens(self, core_id: int, ids: Sequence[int], finish: str | None = None) -> None:
        """One step a token; `finish` comes with the last."""
        for position, token_id in enumerate(ids):
            is_last = position == len(ids) - 1
            self.report(TokenEvent(core_id, token_id, finish=finish if is_last else None))


@dataclass
class Engine:
    """An engine whose core is the test; real gRPC on loopback."""

    tokenizer: TextTokenizer
    metrics: EngineMetrics
    frontend: Frontend
    core: FakeCore
    server: GrpcServer
    channel: grpc.aio.Channel
    stub: engine_pb2_grpc.EngineServiceStub


@pytest.fixture
def tokenizer(checkpoints: dict[str, Path]) -> TextTokenizer:
    return load_tokenizer(checkpoints["byte-level"])


@pytest.fixture
def tracing() -> Tracing:
    return NO_TRACING


@pytest.fixture
async def engine(tokenizer: TextTokenizer, tracing: Tracing) -> AsyncIterator[Engine]:
    metrics = EngineMetrics()
    ids = (f"engine-{n}" for n in itertools.count(1))
    frontend = Frontend(tokenizer, metrics, "tiny", ids.__next__, tracing)
    core = FakeCore(frontend)
    server = GrpcServer("127.0.0.1:0", [SERVICE_NAME], tracing=tracing)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(EngineServicer(frontend, tracing), server.grpc)
    await server.start()
    core.become_ready()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        yield Engine(tokenizer, metrics, frontend, core, server, channel, stub)
    await server.grpc.stop(0)


@pytest.fixture
def sample(engine: Engine) -> Callable[[str], float]:
    """Reads one metric: `name{label="value"}`; 0 if nothing was counted."""

    def read(text: str) -> float:
        lines = generate_latest(engine.metrics.registry).decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == text), 0.0)

    return read
