"""adapter_config.json as a stranger may write it: read soundly or refused, in bounded time and memory, never else."""

from __future__ import annotations

import base64
import contextlib
import json
import tracemalloc
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.adapter_store import pattern_match
from services.adapter_store.manifest import TargetModule
from services.adapter_store.pattern_match import PatternError, match_names
from services.adapter_store.peft_config import MAX_CONFIG_BYTES, LoraConfig, parse_lora_config
from services.adapter_store.preparation import prepare
from services.adapter_store.record_json import PageToken, ResumeToken
from services.adapter_store.safetensors_reader import read_tensor_entries
from services.adapter_store.target_resolution import MAX_RANK, resolve_targets
from services.common.errors import Reason, SloraError
from services.common.grpc_errors import to_grpc_status
from tests.fixtures.adapter_files import BASE, CONFIG, adapter_files

T = TypeVar("T")

REFUSED_AT_READING = {Reason.ADAPTER_CONFIG_INVALID, Reason.ADAPTER_UNSUPPORTED}
REFUSED = REFUSED_AT_READING | {Reason.ADAPTER_RANK_INVALID, Reason.ADAPTER_TENSORS_INVALID}
MOST_MEMORY = 160 * 2**20  # for a text of at most 1 MiB

OPTIONS = [
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "use_dora",
    "modules_to_save", "kasa_config", "lora_dropout", "base_model_name_or_path", "q_proj", "new\0option", "",
]  # fmt: skip
NUMBERS = (
    st.integers(-3, 300)
    | st.integers(-(10**80), 10**80)
    | st.sampled_from([10**400, -(10**4000), 2**63, 1e308, 5e-324, -0.0, float("nan"), float("inf")])
    | st.floats()
)
# Nothing here needs more than a look to match, or a process of its own: those expressions have a test below.
NAMES = st.sampled_from(["q_proj", "v_proj", "layers.1.mlp.up_proj", "all-linear", "ALL-LINEAR", "lm_head", r"\d", "."])
TEXTS = st.text(max_size=6) | NAMES | st.sampled_from(["LORA", "none", "\ud800", "\udfff.q_proj", "\0", "\x85\u2028"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS | st.sampled_from(OPTIONS), inner, max_size=4),
    max_leaves=10,
)


def outcome(call: Callable[[], T]) -> T | SloraError:
    """What `call` gives, or the error that it is documented to raise; any other is the test's end."""
    try:
        return call()
    except SloraError as error:
        return error


def check(config: bytes) -> LoraConfig | None:
    """The configuration if it is read, which then is sound; None if it is refused, in a way that can be told."""
    read = outcome(lambda: parse_lora_config(config))
    if isinstance(read, SloraError):
        assert read.reason in REFUSED_AT_READING
        to_grpc_status(read)
        return None
    assert type(read.rank) is int
    assert np.isfinite(read.alpha)
    assert all(type(rank) is int for _, rank in read.rank_pattern)
    assert all(np.isfinite(alpha) for _, alpha in read.alpha_pattern)
    assert read.layers_to_transform is None or all(type(layer) is int for layer in read.layers_to_transform)
    return read


def needs_a_process(config: LoraConfig) -> bool:
    """Whether its expressions are evaluated in a process of their own, which takes 30 ms."""
    patterns = [*config.layers_patterns, *(key for key, _ in (*config.rank_pattern, *config.alpha_pattern))]
    patterns += [names for names in (config.target_modules, config.exclude_modules) if isinstance(names, str)]
    return not all(pattern_match._LINEAR.fullmatch(pattern) for pattern in patterns)


def check_resolution(config: LoraConfig) -> None:
    """Its modules are the base model's, with ranks that are served, or it is refused."""
    modules = outcome(lambda: resolve_targets(config, BASE))
    if isinstance(modules, SloraError):
        assert modules.reason in REFUSED
        to_grpc_status(modules)
        return
    assert modules
    assert len({(m.layer, m.module) for m in modules}) == len(modules)
    for module in modules:
        assert 0 <= module.layer < BASE.num_layers
        assert isinstance(module.module, TargetModule)
        assert 1 <= module.rank <= MAX_RANK
        assert np.isfinite(module.scaling)


@settings(max_examples=80, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(OPTIONS), VALUES, max_size=5), plain=st.booleans())
@example({"lora_alpha": 1e308, "use_rslora": True}, True)
@example({"layers_to_transform": [10**4000], "layers_pattern": "layers"}, True)
def test_any_options_are_read_soundly_or_refused(fields: dict[str, Any], plain: bool) -> None:
    config = check(json.dumps(CONFIG | fields if plain else fields).encode())
    if config is not None and not needs_a_process(config):
        check_resolution(config)


PIECES = st.sampled_from(
    [b"{", b"}", b"[", b"]", b":", b",", b'"', b'"r"', b'"peft_type"', b'"LORA"', b"4", b"1e999", b"-", b"NaN", b"nul",
     b"\\u0000", b"\\ud83d", b"\\", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\0", b" ",
     b"\xef\xbb\xbf"]
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.lists(PIECES | st.binary(max_size=3), max_size=12).map(b"".join))
@example(b'{"peft_type": "LORA", "r": 4, "r": 8}')
@example(b'\xff\xfe{\0"\0r\0"\0:\x001\0}\0')
def test_any_bytes_are_read_soundly_or_refused(text: bytes) -> None:
    check(text)
    check(json.dumps(CONFIG).encode()[:-1] + b"," + text + b"}")


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("key", ["target_modules", "rank_pattern", "init_lora_weights", "layers_to_transform", "x"])
def test_no_depth_of_nesting_is_an_internal_error(opening: str, closing: str, key: str) -> None:
    base = json.dumps({**CONFIG, key: 0})
    for depth in [*range(900, 1010, 7), *range(980, 1000), 5000]:
        nested = base.replace(f'"{key}": 0', f'"{key}": {opening * depth}1{closing * depth}')
        assert check(nested.encode()) is None


def padded(begin: str, piece: str, end: str) -> bytes:
    room = MAX_CONFIG_BYTES - len(begin) - len(end)
    return (begin + piece * (room // len(piece)) + end).encode()


@pytest.mark.parametrize(
    "text",
    [
        padded('{"peft_type": "LORA", "x": [', "[],", "1]}"),
        padded('{"peft_type": "LORA", "target_modules": [', '"",', '""]}'),
        padded('{"peft_type": "LORA", "layers_to_transform": [', "77777,", "1]}"),
        padded('{"peft_type": "LORA", "base_model_name_or_path": "', "\\u1234", '"}'),
        padded('{"peft_type": "LORA", "r": 1', "0", "}"),
        padded("[", "[", ""),
        padded("", "\xff", ""),
    ],
    ids=["lists", "names", "layers", "escapes", "digits", "nesting", "bytes"],
)
def test_the_largest_texts_take_bounded_memory(text: bytes) -> None:
    tracemalloc.start()
    try:
        config = check(text)
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
    assert config is None or b"base_model_name" in text


@settings(max_examples=8, deadline=None)
@given(st.text(st.sampled_from(list("()[]{}|?*+.^$\\dwbPidx<>=!:,0123aq_\ud800\0é")), min_size=1, max_size=12))
@example("(?\ud800)")
@example("(?P<idx>.*)")
@example("[\ud800-a]")
def test_any_expression_is_evaluated_or_refused(pattern: str) -> None:
    for fields in ({"target_modules": pattern}, {"rank_pattern": {pattern: 4}}):
        config = check(json.dumps(CONFIG | fields).encode())
        if config is not None:
            check_resolution(config)


def test_an_error_with_half_a_surrogate_can_be_told() -> None:
    with pytest.raises(SloraError) as caught:
        prepare(adapter_files(CONFIG | {"target_modules": "(?\ud800)"}), BASE)
    assert caught.value.reason is Reason.ADAPTER_CONFIG_INVALID
    assert "\\ud800" in caught.value.message
    caught.value.message.encode()


LINEAR = st.lists(st.sampled_from([*"aq.^$-_0l", "\\d", "\\.", "layers", "proj"]), max_size=5).map("".join)


@settings(max_examples=4, deadline=None)
@given(st.lists(LINEAR, min_size=1, max_size=4), st.booleans())
def test_here_or_in_a_process_an_expression_means_the_same(patterns: list[str], whole: bool) -> None:
    names = list(BASE.linear_modules())
    here = match_names(patterns, patterns, names, whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pattern_match, "_MAX_MATCHES_HERE", 0)
        assert match_names(patterns, patterns, names, whole) == here


def test_thousands_of_simple_expressions_do_not_hold_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("they were evaluated in the store's own process")

    monkeypatch.setattr(pattern_match, "_match_here", never)
    patterns = [f"layers.{number}" for number in range(4096)]
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(80)]
    with contextlib.suppress(PatternError):  # on a slow machine they take too long there
        assert len(match_names(patterns, patterns, names)) == len(patterns)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20) | VALUES.map(lambda value: base64.b64encode(json.dumps(value).encode()).decode()))
def test_any_token_is_one_that_was_given_out_or_none(token: str) -> None:
    for kind in (PageToken, ResumeToken):
        try:
            read = kind.decode(token)
        except ValueError:
            continue
        assert kind.decode(read.encode()) == read


@pytest.mark.parametrize("piece", ["[],", "{},", '[{"":0}],'])
def test_what_would_hold_the_interpreter_is_counted_before_it_is_parsed(
    piece: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(json, "loads", never)
    config = padded('{"peft_type": "LORA", "x": [', piece, "1]}")
    header = config * 2
    token = base64.b64encode(config).decode()
    with pytest.raises(SloraError, match="lists and objects"):
        parse_lora_config(config)
    with pytest.raises(SloraError, match="lists and objects"):
        read_tensor_entries(memoryview(len(header).to_bytes(8, "little") + header))
    for kind in (PageToken, ResumeToken):
        with pytest.raises(ValueError, match="not a token"):
            kind.decode(token)
