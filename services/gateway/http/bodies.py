"""A request's body: bounded in size and time, JSON of the expected shape, or an error that says what is wrong."""

from __future__ import annotations

import asyncio
import re
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from services.gateway.http.errors import ApiError, invalid

T = TypeVar("T")

MAX_SECONDS = 60.0
"""A body that takes longer to come is given up: whoever dribbles it must not hold a connection for ever."""

_PATH = re.compile(r" - at `(\$\S*)`$")
_OUT_OF_RANGE = re.compile(r"Expected `\w+` [<>]=")
_UNKNOWN, _MISSING = re.compile(r"unknown field `(.*?)`"), re.compile(r"missing required field `(.*?)`")


async def read_body(request: Request, decoder: msgspec.json.Decoder[T], max_bytes: int) -> T:
    """The body, decoded. Raises `ApiError`: 400, 408, 413, 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON: set the header Content-Type: application/json", "not_json")
    try:
        async with asyncio.timeout(MAX_SECONDS):
            content = await _read(request, max_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {MAX_SECONDS:g} s", "body_timeout") from None
    try:
        return decoder.decode(content)
    except msgspec.ValidationError as error:
        raise _as_api_error(str(error)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise invalid(None, f"the body is not JSON: {error}", "invalid_json") from None


async def _read(request: Request, max_bytes: int) -> bytes:
    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > max_bytes:
                message = f"the body is larger than {max_bytes} bytes, which is this gateway's limit"
                raise ApiError(413, message, "body_too_large", headers={"connection": "close"})
    except ClientDisconnect:
        raise ApiError(400, "the connection ended before the body did", "body_incomplete") from None
    return bytes(content)


def _as_api_error(message: str) -> ApiError:
    """msgspec's complaint, with the parameter it is about."""
    path = _PATH.search(message)
    where = path[1].removeprefix("$").removeprefix(".") if path else ""
    message = _PATH.sub("", message)
    prefix = f"{where}." if where else ""
    if found := _UNKNOWN.search(message):
        name = prefix + found[1]
        return invalid(name, f"Unrecognized request argument supplied: {name}", "unknown_parameter")
    if found := _MISSING.search(message):
        name = prefix + found[1]
        return invalid(name, f"{name} is required", "missing_required_parameter")
    parameter = re.split(r"[.\[]", where)[0] or None
    code = "invalid_value" if _OUT_OF_RANGE.match(message) else "invalid_type"
    return invalid(parameter, f"{where or 'the body'}: {message[:1].lower()}{message[1:]}", code)
