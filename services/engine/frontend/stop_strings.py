"""Finds stop strings in text that comes in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """Some stop strings as an Aho-Corasick automaton: however many they are, a character costs one step.

    State 0 is the root; a state stands for the longest suffix of the text so far that begins a stop string.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self.first_characters = frozenset(stop[0] for stop in stop_strings)
        self.goto: list[dict[str, int]] = [{}]
        self.depth = [0]
        # The longest stop string that the state's text ends with.
        self.match: list[str | None] = [None]
        for stop in stop_strings:
            self._add(stop)
        self.fail = self._link()

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self.goto[state].get(character)
            if following is None:
                following = len(self.goto)
                self.goto[state][character] = following
                self.goto.append({})
                self.depth.append(self.depth[state] + 1)
                self.match.append(None)
            state = following
        self.match[state] = stop

    def _link(self) -> list[int]:
        """For each state the one of its longest proper suffix; breadth first, so that shorter ones are ready."""
        fail = [0] * len(self.goto)
        waiting = deque(self.goto[0].values())
        while waiting:
            state = waiting.popleft()
            self.match[state] = self.match[state] or self.match[fail[state]]
            for character, following in self.goto[state].items():
                waiting.append(following)
                fail[following] = self._next(fail[state], character, fail)
        return fail

    def _next(self, state: int, character: str, fail: Sequence[int]) -> int:
        while state and character not in self.goto[state]:
            state = fail[state]
        return self.goto[state].get(character, 0)

    def advance(self, state: int, character: str) -> int:
        """The state after one more character; constant on average."""
        return self._next(state, character, self.fail)

    def num_held(self, state: int) -> int:
        """How many characters at the text's end may still become a stop string."""
        while state and not self.goto[state]:
            state = self.fail[state]
        return self.depth[state]


class StopStringScanner:
    """Passes one sequence's text on, except what may be the start of a stop string.

    The stop string that is complete first ends the text (of two that end together the longer one), so the result
    does not depend on how the text is cut into pieces.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        """`stop_strings` are not empty, neither together nor each."""
        self._automaton = StopStrings(stop_strings)
        self._state = 0
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, may_stop: bool = True) -> str:
        """The text that is certain now. Once `found` is set this was the last of it, cut before the stop string.

        Without `may_stop` a stop string that `text` completes is passed on like any other text; one that is only
        begun may still be completed later.
        """
        automaton, state = self._automaton, self._state
        if not state and automaton.first_characters.isdisjoint(text):
            return text
        for position, character in enumerate(text):
            state = automaton.advance(state, character)
            stop = automaton.match[state]
            if stop is not None and may_stop:
                self.found = stop
                seen = self._held + text[: position + 1]
                self._held = ""
                return seen[: len(seen) - len(stop)]
        self._state = state
        seen = self._held + text
        certain = len(seen) - automaton.num_held(state)
        self._held = seen[certain:]
        return seen[:certain]

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        held, self._held = self._held, ""
        return held
