"""A checkpoint's tokenizer: text to token ids, exactly as transformers' AutoTokenizer does it, without transformers."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from services.engine.frontend.chat_template import ChatTemplate, NoTemplate, load_chat_template
from services.engine.frontend.detokenizer import Detokenizer, token_texts
from services.engine.frontend.request import Chat, ModelLimits, check_length
from services.engine.frontend.token_bound import token_bound

INLINE_CHARACTERS = 2048
"""Shorter texts (about half a millisecond) are tokenized on the event loop: a thread's round trip costs as much."""

NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerFileError(Exception):
    """The checkpoint's tokenizer files are missing or cannot be read; the message says which and why."""


class TextTokenizer:
    """Texts and conversations to ids, and ids back to text. Thread-safe; the `_async` methods keep what is long off
    the event loop."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate | NoTemplate | None = None) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template or NoTemplate()
        # One thread: a flood of long prompts must not take every core from the streams.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._tokens = {token_id: token for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
        added = tokenizer.get_added_tokens_decoder()
        self._tokens |= {token_id: token.content for token_id, token in added.items()}
        special = {token.content for token in added.values() if token.special}
        self._special_ids = frozenset(i for i, token in self._tokens.items() if token in special)
        decoder = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
        self._bound = token_bound(tokenizer)
        self._texts = token_texts(self, decoder)
        self.token_text = functools.lru_cache(maxsize=1 << 16)(self._texts.text)

    @property
    def tokens(self) -> Mapping[int, str]:
        """Every token by its id, as the tokenizer writes it."""
        return self._tokens

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that decoding skips."""
        return self._special_ids

    def encode(self, text: str, limits: ModelLimits | None = None) -> list[int]:
        """The ids of `text`, with the special tokens that the checkpoint puts around a prompt (such as BOS).

        Raises PROMPT_TOO_LONG, without tokenizing it, for a text that cannot fit `limits` however few its tokens are.
        """
        return self._encode(text, limits, with_special_tokens=True)

    async def encode_async(self, text: str, limits: ModelLimits | None = None) -> list[int]:
        """As `encode`; a long text is tokenized on a thread."""
        if len(text) <= INLINE_CHARACTERS:
            return self.encode(text, limits)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.encode, text, limits)

    def encode_chat(self, chat: Chat, limits: ModelLimits | None = None) -> list[int]:
        """The ids of a conversation, as the chat template writes it and with no special tokens but those it writes.

        Raises CHAT_INVALID, CHAT_TEMPLATE_MISSING or, as `encode`, PROMPT_TOO_LONG.
        """
        return self._encode(self._chat_template.render(chat), limits, with_special_tokens=False)

    async def encode_chat_async(self, chat: Chat, limits: ModelLimits | None = None) -> list[int]:
        """As `encode_chat`; a long conversation is written out and tokenized on a thread."""
        if chat.num_characters <= INLINE_CHARACTERS:
            return self.encode_chat(chat, limits)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.encode_chat, chat, limits)

    def _encode(self, text: str, limits: ModelLimits | None, with_special_tokens: bool) -> list[int]:
        if limits is not None and self._bound is not None:
            # A text of 16 MiB would take seconds and more than a gigabyte.
            check_length(self._bound.least_tokens(text, limits.max_model_len), limits, or_more=True)
        # The batch call, unlike `encode`, lets other threads run meanwhile.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=with_special_tokens)[0].ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens kept."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def detokenizer(self) -> Detokenizer:
        """Turns the ids of one sequence into text as they come."""
        return self._texts.detokenizer()


def load_tokenizer(checkpoint: Path) -> TextTokenizer:
    """The tokenizer in `checkpoint`'s tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Raises TokenizerFileError.
    """
    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        raise TokenizerFileError(f"{checkpoint} holds no tokenizer.json; a checkpoint with a fast tokenizer is needed")
    config = _read_json(checkpoint / "tokenizer_config.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerFileError(f"{file} is not a tokenizer: {error}") from error
    # What a file says of training batches is not meant for a single prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    if _is_rebuilt_as_llama(checkpoint, config, tokenizer):
        _rebuild_as_llama(tokenizer, config)
    try:
        _add_special_tokens(tokenizer, checkpoint, config)
        named = _named_special_tokens(checkpoint, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TokenizerFileError(f"{checkpoint / 'tokenizer_config.json'} is malformed: {error!r}") from error
    return TextTokenizer(tokenizer, load_chat_template(checkpoint, config, named))


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerFileError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerFileError(f"{file} holds no JSON object")
    return content


def _add_special_tokens(tokenizer: Tokenizer, checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Tokens that only the configuration names, or names as special: they are kept whole and skipped in decoding."""
    added = config.get("added_tokens_decoder")
    if added is None:
        config = {**config, **_read_json(checkpoint / "special_tokens_map.json")}
    else:
        in_order = sorted(added.items(), key=lambda item: int(item[0]))
        tokenizer.add_tokens([_added_token(value) for _, value in in_order])
    tokenizer.add_special_tokens([_added_token(value) for value in _special_tokens(config)])


def _special_tokens(config: Mapping[str, Any]) -> Iterator[Any]:
    yield from (config[name] for name in NAMED_SPECIAL_TOKENS if config.get(name))
    own_names = (name for name in config if name.endswith("_token") and name not in NAMED_SPECIAL_TOKENS)
    yield from (config[name] for name in own_names if isinstance(config[name], str | dict))
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    yield from extra.values() if isinstance(extra, dict) else extra


def _named_special_tokens(checkpoint: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """What a chat template is told of, such as `bos_token`; an old checkpoint names them in a file of their own."""
    if "added_tokens_decoder" not in config:
        config = {**config, **_read_json(checkpoint / "special_tokens_map.json")}
    given = {name: config[name] for name in NAMED_SPECIAL_TOKENS if config.get(name)}
    return {name: value if isinstance(value, str) else value["content"] for name, value in given.items()}


def _added_token(value: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    known = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(value["content"], **{key: value[key] for key in known if key in value})


def _is_rebuilt_as_llama(checkpoint: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether transformers takes only vocabulary and merges from tokenizer.json, because of the declared class.

    Its Llama class splits at spaces by itself: unlike the normalizer that old files carry it adds no second space
    before a text that begins with one.
    """
    declared = config.get("tokenizer_class")
    if declared not in ("LlamaTokenizer", "LlamaTokenizerFast") or not isinstance(tokenizer.model, models.BPE):
        return False
    model_type = _read_json(checkpoint / "config.json").get("model_type", "")
    byte_level = "ByteLevel" in f"{tokenizer.pre_tokenizer!r}{tokenizer.decoder!r}"
    return model_type == "llama" and not byte_level


def _rebuild_as_llama(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    add_prefix_space = config.get("add_prefix_space")
    add_prefix_space = True if add_prefix_space is None else bool(add_prefix_space)
    first = "always" if config.get("legacy", False) else "first"
    tokenizer.model.fuse_unk = True
    tokenizer.model.byte_fallback = True
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=first if add_prefix_space else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if add_prefix_space else [])])
