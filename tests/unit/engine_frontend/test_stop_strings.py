from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.frontend.stop_strings import StopStringScanner

LETTERS = st.text(alphabet="ab", min_size=1, max_size=5)


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: the first place where the text ends with a stop string; the longest one there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def scan(chunks: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    scanner = StopStringScanner(stops)
    out = []
    for chunk in chunks:
        out.append(scanner.push(chunk))
        if scanner.found is not None:
            return out, scanner.found
    out.append(scanner.flush())
    return out, None


@settings(max_examples=1500, deadline=None)
@given(
    chunks=st.lists(st.text(alphabet="abc", max_size=6), max_size=12), stops=st.lists(LETTERS, min_size=1, max_size=5)
)
def test_finds_the_first_however_the_text_is_cut(chunks: list[str], stops: list[str]) -> None:
    out, found = scan(chunks, stops)
    assert ("".join(out), found) == expected("".join(chunks), stops)


@settings(max_examples=500, deadline=None)
@given(
    chunks=st.lists(st.text(alphabet="abc", max_size=6), max_size=12), stops=st.lists(LETTERS, min_size=1, max_size=5)
)
def test_holds_back_exactly_what_could_still_become_a_stop(chunks: list[str], stops: list[str]) -> None:
    scanner, seen, shown = StopStringScanner(stops), "", ""
    for chunk in chunks:
        seen += chunk
        shown += scanner.push(chunk)
        if scanner.found is not None:
            return
        held = max((n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0)
        assert shown == seen[: len(seen) - held]


def test_boundary_inside_a_stop_string() -> None:
    out, found = scan(["Hello wor", "ld <e", "n", "d> and more"], ["<end>"])
    assert out == ["Hello wor", "ld ", "", ""]
    assert found == "<end>"


def test_a_false_start_is_passed_on() -> None:
    out, found = scan(["a <en", "tity", " <e"], ["<end>"])
    assert out == ["a ", "<entity", " ", "<e"]
    assert found is None


def test_what_may_not_stop_is_text() -> None:
    scanner = StopStringScanner(["END"])
    assert scanner.push("one END", may_stop=False) == "one END"
    assert scanner.push(" two E", may_stop=False) == " two "
    assert scanner.push("ND rest", may_stop=True) == ""
    assert scanner.found == "END"


@settings(max_examples=300, deadline=None)
@given(
    chunks=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=12),
    stops=st.lists(LETTERS, min_size=1, max_size=4),
    first=st.integers(0, 12),
)
def test_min_tokens_counts_where_a_stop_string_ends(chunks: list[str], stops: list[str], first: int) -> None:
    """With one chunk a token: a stop string counts if the token that completes it may stop."""
    scanner, shown = StopStringScanner(stops), ""
    for number, chunk in enumerate(chunks):
        shown += scanner.push(chunk, may_stop=number >= first)
        if scanner.found is not None:
            break
    text, position = "".join(chunks), len("".join(chunks[:first]))
    for end in range(position + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            # What was already shown stays shown where the stop string reaches back into text that was passed on.
            assert scanner.found == longest
            assert shown == text[: end - len(longest)]
            return
    assert scanner.found is None
    assert shown + scanner.flush() == text


def test_cost_is_linear_in_the_text() -> None:
    stops = ["a" * length + "b" for length in range(240, 256)]  # the worst: every suffix begins every stop string

    def seconds(count: int) -> float:
        scanner = StopStringScanner(stops)
        start = time.thread_time()
        for _ in range(count):
            scanner.push("aaaa")
        return time.thread_time() - start

    seconds(1000)
    assert seconds(40_000) < 40 * seconds(4_000) + 0.05
