"""Lines of the log: what they hold, for machines and for people, and whose request they are about."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

import pytest

from services.common.request_id import bind_request_id, current_request_id, request_id_in
from services.common.telemetry import JsonFormatter, TextFormatter


def record(message: str = "it happened", error: BaseException | None = None, **extra: Any) -> logging.LogRecord:
    exc_info = (type(error), error, error.__traceback__) if error is not None else None
    made = logging.LogRecord("services.test", logging.WARNING, __file__, 1, message, (), exc_info)
    vars(made).update(extra)
    return made


async def test_lines_name_the_request_that_is_current() -> None:
    formatter = JsonFormatter("gateway")

    async def request(request_id: str) -> list[dict[str, Any]]:
        bind_request_id(request_id)
        await asyncio.sleep(0)
        return [json.loads(formatter.format(record())), json.loads(formatter.format(record(request_id="other")))]

    both = await asyncio.gather(*map(asyncio.create_task, map(request, ("r-1", "r-2"))))
    assert [[line["request_id"] for line in lines] for lines in both] == [["r-1", "other"], ["r-2", "other"]]
    assert "request_id" not in json.loads(formatter.format(record()))
    assert current_request_id() == ""


def test_a_line_for_people_is_one_line_with_everything() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        made = record("two\nlines", sys.exc_info()[1], engine="e:1", why="it is so", empty="")
    first, *traceback = TextFormatter("gateway").format(made).splitlines()
    assert first.endswith('WARNING gateway two\\nlines engine=e:1 why="it is so" empty=""')
    assert traceback[-1] == "ValueError: no"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [((), ""), ((("x-request-id", "r"), ("x-request-id", "s")), "r"), ((("x-request-id", "r" * 999),), "r" * 128)],
)
def test_the_id_of_a_call(metadata: Any, expected: str) -> None:
    assert request_id_in(metadata) == expected
