"""What a log line looks like, and whom it is about.

``text`` is what the quickstart page shows; ``json`` is one object a line, for machines::

    {"time": "2026-11-23T16:59:35.123Z", "level": "info", "logger": "gpu_byoc.stream",
     "message": "stream a: started", "stream": "a"}

``exception`` is there where there is one, the whole traceback as one string. ``about`` says which stream or job what
follows belongs to, in this task or thread and in the tasks it starts; a thread begins with nothing. In text the id is
added to lines that do not mention it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final

from gpu_byoc.errors import ConfigError
from gpu_byoc.redact import redacted

PAGE_FORMAT: Final = "%(levelname)s: %(message)s"

_about: ContextVar[Mapping[str, str]] = ContextVar("gpu_byoc_about", default={})  # noqa: B039 - never written to


@contextmanager
def about(**ids: str) -> Iterator[None]:
    """``stream=NAME`` or ``job=ID``. Also a decorator, which is how a thread's function gets it."""
    token = _about.set({**_about.get(), **ids})
    try:
        yield
    finally:
        _about.reset(token)


def whom() -> Mapping[str, str]:
    """The ids that hold here."""
    return _about.get()


class Redacting(logging.Formatter):
    """The last line of defence: whatever raised may have put a channel's URL into its message."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return redacted(super().formatException(ei))


class TextFormatter(Redacting):
    def __init__(self) -> None:
        super().__init__(PAGE_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return super().formatMessage(record) + unsaid(record.message)


def unsaid(message: str) -> str:
    """The ids that hold here and that ``message`` does not say itself, as ``stream NAME`` or ``job ID``."""
    rest = [f"{kind} {name}" for kind, name in _about.get().items()]
    rest = [whose for whose in rest if not re.search(rf"\b{re.escape(whose)}(?![\w.-])", message)]
    return f" ({', '.join(rest)})" if rest else ""


class JsonFormatter(Redacting):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_about.get(),
        }
        if record.exc_info and record.exc_info[0] is not None:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


FORMATS: Final[dict[str, type[logging.Formatter]]] = {"text": TextFormatter, "json": JsonFormatter}


def formatter(name: str) -> logging.Formatter:
    """Raises ConfigError."""
    if name not in FORMATS:
        raise ConfigError(f"--log-format {name!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[name]()
