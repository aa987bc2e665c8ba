"""A conversation on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from slora_client.command.outcome import told
from slora_client.command.terminal import Speaker
from slora_client.errors import SloraRequestError
from slora_client.options import GenerationOptions
from slora_client.values import ChatMessage, Chunk

PROMPT = "> "
CLEAR = "/clear"


class Conversation:
    """Keeps what was said; an answer that was stopped stays as far as it came."""

    def __init__(
        self, speaker: Speaker, model: str, opening: Sequence[ChatMessage], options: GenerationOptions
    ) -> None:
        self._speaker = speaker
        self._model = model
        self._opening = list(opening)
        self._options = options
        self.messages = list(opening)
        self.has_failed = False

    def run(self) -> None:
        """Reads lines and answers them until there are no more."""
        while (line := _read_line()) is not None:
            if line == CLEAR:
                self.messages = list(self._opening)
            elif line.strip():
                self.say(line)

    def say(self, text: str) -> None:
        """Answers one message. What fails is told, and is as if it had not been said."""
        asked = [*self.messages, ChatMessage("user", text)]
        said: list[Chunk] = []
        try:
            self._speaker.say(self._model, asked, self._options, said)
        except KeyboardInterrupt:
            pass  # the part that came counts
        except SloraRequestError as error:
            sys.stdout.write("\n" if said else "")
            sys.stderr.write(f"slora: {told(error)}\n")
            self.has_failed = True
            return
        sys.stdout.write("\n")
        answer = "".join(chunk.text for chunk in said)
        self.messages = [*asked, ChatMessage("assistant", answer)]


def _read_line() -> str | None:
    try:
        return input(PROMPT)
    except (EOFError, KeyboardInterrupt):
        sys.stdout.write("\n")
        return None
