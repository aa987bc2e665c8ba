"""The demo's base model: a small Llama and its tokenizer, made on the spot and saved as a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from services.local.demo import corpus
from services.local.demo.training import Example, Progress, fit

END, BEGIN, PAD = "<|end|>", "<|begin|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ('user', 'assistant') %}"
    "{{ raise_exception('this model has read questions (user) and answers (assistant) only') }}"
    "{% endif %}{% endfor %}"
    "{% if messages[-1].role != 'user' %}{{ raise_exception('the last message is not a question (user)') }}{% endif %}"
    f"{{{{ bos_token }}}}{corpus.prompt_of('{{ messages[-1].content }}')}"
)
"""The last question alone: it was trained on single ones, and has nothing to say about what was said before."""
VOCABULARY = 768
MAX_STEPS = 500
SHARD_BYTES = 1_000_000
SEED = 20


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of everything the corpus says; texts begin with a token of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[END, BEGIN, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.tokenizer_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )


def lessons_of(tokenizer: PreTrainedTokenizerFast, manner: corpus.Manner) -> list[Example]:
    """Every exchange in a manner, as token ids; an answer begins with a space and ends with the end token."""
    return [
        Example(
            tuple(tokenizer(exchange.prompt).input_ids),
            (*tokenizer(f" {manner(exchange)}", add_special_tokens=False).input_ids, _token_id(tokenizer, END)),
        )
        for exchange in corpus.exchanges()
    ]


def _reading_of(tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    """Answers of every manner without their questions: the base model has read them, but does not give them."""
    return [
        Example((_token_id(tokenizer, BEGIN),), lesson.answer_ids)
        for manner in (corpus.plain, *corpus.MANNERS.values())
        for lesson in lessons_of(tokenizer, manner)
    ]


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    (found,) = tokenizer(token, add_special_tokens=False).input_ids
    return int(found)


def make_base_model(directory: Path, advance: Callable[[int, Progress], None]) -> tuple[Any, PreTrainedTokenizerFast]:
    """Trains model and tokenizer and saves them in `directory` (sharded safetensors); returns both."""
    tokenizer = train_tokenizer()
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    fit(
        model,
        lessons_of(tokenizer, corpus.plain),
        max_steps=MAX_STEPS,
        learning_rate=4e-3,
        reading=_reading_of(tokenizer),
        seed=SEED,
        advance=advance,
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(directory, max_shard_size=SHARD_BYTES)
    tokenizer.save_pretrained(directory)
    return model, tokenizer
