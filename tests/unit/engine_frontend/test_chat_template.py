"""Conversations are written out and tokenized as transformers does it; what cannot be written is refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest
from slora.engine.v1 import engine_pb2, generation_pb2
from transformers import AutoTokenizer

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import from_rpc_error
from services.engine.frontend import tokenizer as tokenizer_module
from services.engine.frontend.request import Chat, ChatMessage
from services.engine.frontend.tokenizer import TextTokenizer, load_tokenizer
from services.engine.messages import Generate

CHATML = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}
<|begin|>system
You help.<|end|>
{% endif %}
{{ '<|begin|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% endif %}"""

LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{%- set system = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for message in rest %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if loop.index0 == 0 and system != false %}
{%- set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message.content %}
{%- else %}{% set content = message['content'] %}{% endif %}
{%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{%- generation %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endgeneration %}
{%- endif %}{% endfor %}"""

NAMESPACES = """{% set ns = namespace(count=0) %}
{%- for message in messages %}{% if message.content is not defined %}{% continue %}{% endif %}
{%- set ns.count = ns.count + 1 %}{{ message | tojson }}{% if message.name is defined %}({{ message.name }}){% endif %}
{% if ns.count > 6 %}{% break %}{% endif %}{% endfor %}{{ ns.count }}{{ tools is none }}{{ strftime_now('%Y') }}"""


def chat(*messages: tuple[str, str], prompt: bool = True) -> Chat:
    return Chat(tuple(ChatMessage(role, content) for role, content in messages), prompt)


def with_template(source: Path, directory: Path, template: object, in_file: bool = True) -> Path:
    """A copy of a checkpoint that has a chat template."""
    shutil.copytree(source, directory)
    if in_file:
        (directory / "chat_template.jinja").write_text(str(template))
    else:
        config = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return directory


def draw_messages(draw: random.Random) -> list[tuple[str, str]]:
    texts = ["", " ", "Hi <b>there</b> & 'you'", "äöü 数字 🙂", "\n\nline\n", "<|end|>", "{{ 1 }}", "a" * 50]
    said = [("user" if n % 2 == 0 else "assistant", draw.choice(texts)) for n in range(draw.randint(1, 9))]
    return [("system", draw.choice(texts)), *said] if draw.random() < 0.5 else said


@pytest.mark.parametrize("kind", ["byte-level", "extra-special", "sentencepiece", "llama-class"])
@pytest.mark.parametrize("template", [CHATML, LLAMA_2, NAMESPACES], ids=["chatml", "llama-2", "namespaces"])
@pytest.mark.parametrize("in_file", [True, False], ids=["file", "config"])
def test_conversations_become_transformers_tokens(
    kind: str, template: str, in_file: bool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = with_template(checkpoints[kind], tmp_path / "c", template, in_file)
    ours, reference = load_tokenizer(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    seed = random.randrange(2**31)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(20):
        messages, prompt = draw_messages(draw), draw.random() < 0.7
        expected = reference.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            add_generation_prompt=prompt,
            return_dict=False,
        )
        assert ours.encode_chat(chat(*messages, prompt=prompt)) == expected, messages


def test_names_reach_the_template_and_nothing_else_is_added(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = with_template(
        checkpoints["byte-level"], tmp_path / "c", "{{ messages[0].name }}:{{ messages[0].role }}"
    )
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode_chat(Chat((ChatMessage("user", "x", name="ann"),)))
    assert tokenizer.decode(ids) == "ann:user"


def test_of_several_templates_in_a_configuration_the_default_is_taken(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    several = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": "right"}]
    tokenizer = load_tokenizer(with_template(checkpoints["words"], tmp_path / "c", several, in_file=False))
    assert tokenizer.encode_chat(chat(("user", "x"))) == tokenizer.encode("right")


@pytest.mark.parametrize(
    ("template", "in_file", "complaint"),
    [
        (None, True, "has no chat template"),
        ("{% for %}", True, "cannot be read"),
        (17, False, "cannot be read: it is a int"),
        ([{"name": "other", "template": "x"}], False, "has no chat template"),
    ],
)
def test_a_checkpoint_without_a_usable_template_says_so_to_those_who_ask(
    template: object, in_file: bool, complaint: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = checkpoints["byte-level"]
    checkpoint = source if template is None else with_template(source, tmp_path / "c", template, in_file)
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.encode("Hello")
    with pytest.raises(SloraError, match=complaint) as caught:
        tokenizer.encode_chat(chat(("user", "x")))
    assert caught.value.reason is Reason.CHAT_TEMPLATE_MISSING


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (LLAMA_2, "must alternate"),
        ("{{ messages[5].content }}", "has no element 5"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ],
)
def test_what_the_template_refuses_or_may_not_do_is_the_callers_to_know(
    template: str, complaint: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(with_template(checkpoints["byte-level"], tmp_path / "c", template))
    with pytest.raises(SloraError, match=complaint) as caught:
        tokenizer.encode_chat(chat(("assistant", "x")))
    assert caught.value.reason is Reason.CHAT_INVALID


async def test_long_conversations_are_written_on_a_thread(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(with_template(checkpoints["byte-level"], tmp_path / "c", CHATML))
    long = chat(("user", "word " * 1000))
    on_thread = await tokenizer.encode_chat_async(long)
    monkeypatch.setattr(tokenizer_module, "INLINE_CHARACTERS", 10**9)
    assert on_thread == await tokenizer.encode_chat_async(long)


@pytest.fixture
def tokenizer(checkpoints: dict[str, Path], tmp_path: Path) -> TextTokenizer:
    return load_tokenizer(with_template(checkpoints["byte-level"], tmp_path / "c", CHATML))


async def test_an_engine_takes_conversations(engine: Any) -> None:
    messages = [generation_pb2.ChatMessage(role="user", content="Hello")]
    for prompt in (True, False):
        asked = generation_pb2.Chat(messages=messages, add_generation_prompt=prompt)
        call = engine.stub.Generate(engine_pb2.GenerateRequest(request_id="x", prompt={"chat": asked}))
        sent = await engine.core.take(Generate)
        assert sent.prompt_ids == engine.tokenizer.encode_chat(chat(("user", "Hello"), prompt=prompt))
        engine.core.tokens(sent.request_id, [300], "length")
        assert [message async for message in call][-1].completion.usage.num_prompt_tokens == len(sent.prompt_ids)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"content": "x"}],
        [{"role": "user"}, {"role": "r" * 65}],
        [{"role": "user", "name": "n" * 65}],
    ],
)
async def test_an_engine_refuses_conversations_without_sense(engine: Any, messages: list[dict[str, str]]) -> None:
    prompt = generation_pb2.Prompt(chat=generation_pb2.Chat(messages=messages))  # type: ignore[arg-type]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(engine.stub.Generate(engine_pb2.GenerateRequest(request_id="x", prompt=prompt))))
    assert from_rpc_error(caught.value, Reason.INTERNAL).reason is Reason.CHAT_INVALID
