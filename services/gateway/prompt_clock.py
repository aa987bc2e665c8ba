"""How long a new prompt would wait at one engine for those that this gateway has there. Pure; told of each event.

An engine computes its prompts in steps. While a step with a prompt in it runs nothing else is answered, and a prompt
that comes meanwhile waits for the next one: on an idle fleet that, and not the queue, is what makes first tokens late.
A step's end shows at the gateway, since it brings a message of each generation that runs there; so it is known which
prompts are being computed, since when, and from those before for how long. Reports, ten a second, come too late.

What cannot be known is not made up: a clock that has seen no prompt answered says that there is nothing to wait for,
one that has seen no adapter loaded does not say how long that takes.
"""

from __future__ import annotations

from dataclasses import dataclass

WEIGHT = 1 / 8
"""Of a new observation in an average over the last few."""


@dataclass(eq=False)
class Prompt:
    """A request without a first message."""

    sent_at: float
    waits_for_adapter: bool = False
    """Its adapter is not there, or was not when the engine last reported."""
    has_it_loaded: bool = False
    """It is the first that needs it, so that its time says how long loads take."""
    begun_at: float | None = None
    """Since when it is computed; None: it is not, or nobody can tell."""


class PromptClock:
    """Of one engine. All times are in seconds of one clock."""

    def __init__(self) -> None:
        self._open: dict[Prompt, None] = {}
        self._prompt_seconds: float | None = None
        self._load_seconds: float | None = None

    def __len__(self) -> int:
        """Prompts without an answer."""
        return len(self._open)

    @property
    def load_seconds(self) -> float | None:
        """How much later a first message comes that needs the adapter loaded, with nothing else in its way: the least
        of late. None: none was loaded yet."""
        return self._load_seconds

    def sent(self, prompt: Prompt, *, is_quiet: bool) -> None:
        """A request went there. `is_quiet`: nothing runs there whose messages would tell when a step ends."""
        if is_quiet and not prompt.waits_for_adapter and all(other.begun_at is None for other in self._open):
            prompt.begun_at = prompt.sent_at
        self._open[prompt] = None

    def stepped(self, now: float) -> None:
        """A step ended there: what waited for it is computed in the next."""
        for prompt in self._open:
            if prompt.begun_at is None and not prompt.waits_for_adapter:
                prompt.begun_at = now

    def answered(self, prompt: Prompt, now: float) -> None:
        """Its first message came, and with it the end of a step."""
        self.gone(prompt)
        if prompt.has_it_loaded:
            seconds = now - prompt.sent_at - (self._prompt_seconds or 0.0)
            self._load_seconds = _shortest(self._load_seconds, max(seconds, 0.0))
        elif prompt.begun_at is not None:
            self._prompt_seconds = _averaged(self._prompt_seconds, now - prompt.begun_at)
        self.stepped(now)

    def gone(self, prompt: Prompt) -> None:
        """It will not be answered there."""
        self._open.pop(prompt, None)

    def wait_seconds(self, now: float) -> float:
        """How long a prompt that came now would wait, or keep one waiting that has its adapter loaded."""
        if self._prompt_seconds is None:
            return 0.0
        ends = (self._begins_at(prompt, now) + self._prompt_seconds for prompt in self._open)
        return min(max(0.0, max(ends, default=now) - now), self._prompt_seconds)

    def _begins_at(self, prompt: Prompt, now: float) -> float:
        if prompt.waits_for_adapter:
            return prompt.sent_at + (self._load_seconds or 0.0)
        # One that is not begun is no hindrance: the new one is computed beside it.
        return float("-inf") if prompt.begun_at is None else prompt.begun_at


def _averaged(average: float | None, value: float) -> float:
    return value if average is None else average + WEIGHT * (value - average)


def _shortest(least: float | None, value: float) -> float:
    """Follows the lower ones of values that something may lengthen: down at once, up slowly."""
    return min(value, _averaged(least, value))
