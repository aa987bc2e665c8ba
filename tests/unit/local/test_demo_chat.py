"""The demo's model is asked in chats as it was in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.common.errors import Reason, SloraError
from services.engine.frontend.chat_template import ChatTemplate, load_chat_template
from services.engine.frontend.request import Chat, ChatMessage
from services.local.demo.base_model import BEGIN, END, train_tokenizer
from services.local.demo.corpus import SHOWN_QUESTIONS, prompt_of


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    """As the engine reads it from the checkpoint that the tokenizer is saved in."""
    checkpoint = tmp_path_factory.mktemp("tiny")
    train_tokenizer().save_pretrained(checkpoint)
    config = json.loads(Path(checkpoint / "tokenizer_config.json").read_text())
    loaded = load_chat_template(checkpoint, config, {"bos_token": BEGIN, "eos_token": END})
    assert isinstance(loaded, ChatTemplate)
    return loaded


def said(*turns: tuple[str, str]) -> Chat:
    return Chat(tuple(ChatMessage(role, content) for role, content in turns))


@pytest.mark.parametrize("question", SHOWN_QUESTIONS)
def test_a_question_is_written_as_in_training(template: ChatTemplate, question: str) -> None:
    assert template.render(said(("user", question))) == BEGIN + prompt_of(question)


def test_what_was_said_before_is_left_out(template: ChatTemplate) -> None:
    chat = said(("user", "What is tea?"), ("assistant", " Tea is a drink."), ("user", "What is the sun?"))
    assert template.render(chat) == BEGIN + prompt_of("What is the sun?")


@pytest.mark.parametrize(
    "turns",
    [
        (("system", "Be brief."), ("user", "What is the sun?")),
        (("user", "What is the sun?"), ("assistant", " The sun is")),
    ],
)
def test_what_it_was_not_trained_on_is_refused(template: ChatTemplate, turns: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(SloraError) as caught:
        template.render(said(*turns))
    assert caught.value.reason is Reason.CHAT_INVALID
