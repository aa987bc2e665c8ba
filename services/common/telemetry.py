"""Logs, a line an event, with the id of the request they are about; metrics over HTTP, with bounded label sets."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from wsgiref.simple_server import WSGIServer

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from services.common.request_id import current_request_id
from services.common.settings import AddressError, LogFormat
from services.common.tracing import current_span

OTHER = "other"


_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """What `extra=` adds, and what the line is about: the request and the trace that are current, where there are."""
    current = {"request_id": current_request_id(), "trace_id": current_span().trace_id}
    told = {key: value for key, value in vars(record).items() if key not in _KNOWN}
    return {key: value for key, value in current.items() if value} | told


def _time_of(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, service, logger, message, error, and the fields."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line: dict[str, object] = {
            "time": _time_of(record),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _fields(record)
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """For people: time, level, service, message, then the fields as key=value; a traceback behind it."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        fields = "".join(f" {key}={_shown(value)}" for key, value in _fields(record).items())
        error = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        message = record.getMessage().replace("\n", "\\n")
        return f"{_time_of(record)} {record.levelname:<7} {self._service} {message}{fields}{error}"


def _shown(value: object) -> str:
    text = str(value)
    return text if text and text.isprintable() and " " not in text else json.dumps(text, ensure_ascii=False)


def configure_logging(service: str, level: str = "INFO", log_format: LogFormat = "json") -> None:
    """Sends all logs of this process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service) if log_format == "json" else TextFormatter(service))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def serve_metrics(address: str, registry: CollectorRegistry = REGISTRY) -> tuple[WSGIServer, threading.Thread] | None:
    """Serves `/metrics` at `host:port` on a thread of its own; an empty address serves nothing.

    Raises AddressError if that cannot be listened on.
    """
    if not address:
        return None
    host, _, port = address.rpartition(":")
    try:
        server, thread = start_http_server(int(port), addr=host or "127.0.0.1", registry=registry)
    except (OSError, ValueError, OverflowError) as error:
        raise AddressError(f"--metrics {address}: {error}") from error
    return server, thread


class BoundedLabels:
    """Keeps a label's number of values bounded: the first `max_values` seen keep their names, the rest are `other`."""

    def __init__(self, max_values: int = 100) -> None:
        self._max_values = max_values
        self._values: set[str] = set()

    def __call__(self, value: str) -> str:
        """`value`, or `other` once there are too many different ones."""
        if value in self._values:
            return value
        if len(self._values) >= self._max_values:
            return OTHER
        self._values.add(value)
        return value
