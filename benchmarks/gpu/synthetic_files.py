"""What services read: a checkpoint directory without weights, and PEFT adapters that differ, written in moments."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.adapter_ranks import RANKS, ranks_in_turn
from benchmarks.gpu.bench_model import BenchModel
from benchmarks.gpu.synthetic import TARGETS, served_name, write_config
from services.engine.model.config import load_model_config
from services.engine.model.step_ops import module_groups

_LETTERS = "etaoinshrdlucmfwypvbgkqjxz"
_PARENTS = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
_SPARE_ELEMS = 2**20


def write_checkpoint(parent: Path, model: BenchModel) -> Path:
    """A directory with config.json and tokenizer.json, named as the base model is served."""
    directory = write_config(parent / served_name(model.shape), model.shape, model.max_len, model.dtype)
    config = load_model_config(directory, model.dtype)
    _tokenizer(config.vocab_size).save(str(directory / "tokenizer.json"))
    return directory


def write_adapters(parent: Path, checkpoint: Path, model: BenchModel, setting: str, number: int) -> list[str]:
    """Adapters of a setting, each a directory as PEFT saves it; returns their names.

    Each takes another part of one run of random numbers: no two have the same content, and none has to be drawn anew.
    """
    shapes = list(_tensor_shapes(checkpoint, model, max(RANKS[setting])))
    most_elems = sum(math.prod(shape) for _, shape in shapes)
    dtype = getattr(torch, model.dtype)
    random = (torch.randn(most_elems + _SPARE_ELEMS) * 0.01).to(dtype)
    pool = memoryview(random.view(torch.uint8).numpy().data)
    names = []
    for i, rank in enumerate(ranks_in_turn(setting, number)):
        name = f"{setting.lower()}-{i}"
        directory = parent / name
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text(json.dumps(_peft_config(model, rank)))
        header, num_bytes = _safetensors_header(_tensor_shapes(checkpoint, model, rank), dtype)
        begin = (i * 4099 % _SPARE_ELEMS) * dtype.itemsize
        with (directory / "adapter_model.safetensors").open("wb") as file:
            file.write(header)
            file.write(pool[begin : begin + num_bytes])
        names.append(name)
    return names


def _peft_config(model: BenchModel, rank: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [f"{module.name.lower()}_proj" for module in TARGETS[model.targets]],
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _tensor_shapes(checkpoint: Path, model: BenchModel, rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of an adapter's tensors, as PEFT names them."""
    config = load_model_config(checkpoint, model.dtype)
    features = {
        module: (group.in_features, size)
        for group in module_groups(config)
        for module, size in zip(group.modules, group.out_features, strict=True)
    }
    for layer in range(config.num_layers):
        for module in TARGETS[model.targets]:
            inputs, outputs = features[module]
            short = module.name.lower()
            name = f"base_model.model.model.layers.{layer}.{_PARENTS.get(short, 'mlp')}.{short}_proj"
            yield f"{name}.lora_A.weight", (rank, inputs)
            yield f"{name}.lora_B.weight", (outputs, rank)


def _safetensors_header(shapes: Iterator[tuple[str, tuple[int, int]]], dtype: torch.dtype) -> tuple[bytes, int]:
    """The head of a safetensors file, and how many bytes of tensors follow."""
    kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    entries, offset = {}, 0
    for name, shape in shapes:
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, offset


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Bytes as all byte-level tokenizers have them, then made-up words: what comes out is text at a text's cost."""
    lengths = itertools.count(2)
    words = (f"Ġ{''.join(word)}" for length in lengths for word in itertools.product(_LETTERS, repeat=length))
    pieces = itertools.chain(sorted(pre_tokenizers.ByteLevel.alphabet()), words)
    vocabulary = {piece: i for i, piece in enumerate(itertools.islice(pieces, vocab_size))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
