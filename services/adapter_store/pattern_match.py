"""Evaluates regular expressions that strangers wrote, without letting one of them hold up the store.

Python's `re` backtracks, holds the GIL and cannot be interrupted, so `(a+)+$` could stop every stream of this process.
A few expressions without repetition, groups or alternatives, which are linear, run here; all others run in a
short-lived child process whose CPU time is bounded.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

MAX_PATTERN_CHARS = 4096
MAX_CPU_SECONDS = 2
# Half a microsecond each, with the interpreter held.
_MAX_MATCHES_HERE = 50_000
_MAX_WALL_SECONDS = 60.0

# Literals, dots and anchors; also an escaped dot or digit class.
_LINEAR = re.compile(r"(?:[A-Za-z0-9_.^$-]|\\[.d])*")

_CHILD = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({MAX_CPU_SECONDS}, {MAX_CPU_SECONDS + 1}))
resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
patterns, names, whole = json.load(sys.stdin)
answer = []
for pattern in patterns:
    try:
        compiled = re.compile(pattern)
        match = compiled.fullmatch if whole else compiled.match
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        answer.append(str(error) or type(error).__name__)
        continue
    answer.append([m.groupdict().get("idx") or True if (m := match(name)) else False for name in names])
json.dump(answer, sys.stdout)
"""

# For each name: no match, a match, or the match's group `idx`.
MatchRow = list[bool | str]


class PatternError(ValueError):
    """A pattern cannot be compiled, is too long, or takes too long to evaluate."""

    def __init__(self, pattern: str, problem: str) -> None:
        super().__init__(f"{pattern[:200]!r}: {problem}")
        self.pattern = pattern


def match_names(
    patterns: Sequence[str], wrapped: Sequence[str], names: Sequence[str], whole: bool = False
) -> list[MatchRow]:
    """`re.match` (or, with `whole`, `re.fullmatch`) of each of `wrapped` against each name: one row a pattern.

    `patterns` are what the stranger wrote and `wrapped` the same as PEFT puts them into its own expressions; the
    former decide what is safe and are named in a PatternError.
    """
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise PatternError(pattern, f"longer than {MAX_PATTERN_CHARS} characters")
    few = len(wrapped) * len(names) <= _MAX_MATCHES_HERE
    if few and all(_LINEAR.fullmatch(pattern) for pattern in patterns):
        return [_match_here(pattern, names, whole) for pattern in wrapped]
    return _match_in_child(patterns, wrapped, names, whole)


def _match_here(pattern: str, names: Sequence[str], whole: bool) -> MatchRow:
    compiled = re.compile(pattern)
    match = compiled.fullmatch if whole else compiled.match
    return [m.groupdict().get("idx") or True if (m := match(name)) else False for name in names]


def _match_in_child(
    patterns: Sequence[str], wrapped: Sequence[str], names: Sequence[str], whole: bool
) -> list[MatchRow]:
    # -I -S: an interpreter with nothing loaded that an environment or a site package could add; it starts in 10 ms.
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    question = json.dumps([list(wrapped), list(names), whole])
    try:
        done = subprocess.run(
            command, input=question, capture_output=True, text=True, timeout=_MAX_WALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise PatternError(", ".join(patterns), "takes too long to evaluate") from None
    if done.returncode < 0:
        raise PatternError(", ".join(patterns), f"takes more than {MAX_CPU_SECONDS} s of CPU time to evaluate")
    if done.returncode != 0:
        raise PatternError(", ".join(patterns), "cannot be evaluated within the store's limits")
    answer = json.loads(done.stdout)
    for pattern, row in zip(patterns, answer, strict=True):
        if isinstance(row, str):
            raise PatternError(pattern, f"not a regular expression: {row}")
    return list(answer)
