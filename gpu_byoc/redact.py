"""What may be said of a secret: nothing; and of a channel's URL: its origin. Whoever knows a channel's URL can read the
channel and write to it, so logs, events and answers name it only by scheme, host and port.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

HIDDEN: Final = "***"
_URL = re.compile(r"(https?://)([^\s/?#'\"<>@]*@)?([^\s/?#'\"<>@]*)([/?#][^\s'\"<>]*)?", re.IGNORECASE)
_SHORTEST, _SHORTEST_FOLDER = 4, 8
"""Letters of a path's last part, and of one before it, that are worth hiding: shorter ones are in half of all words."""


def redacted(url: str) -> str:
    """``https://host:8935/***``; the path may be missing, then nothing is hidden."""
    return _URL.sub(_origin, url)


def scrubbed(text: str, url: str = "", secrets: Iterable[str] = ()) -> str:
    """``text``, from whoever, fit for one line of a log: URLs in it redacted, the path of ``url`` and its parts
    hidden where they stand alone, and every one of ``secrets``, too."""
    text = redacted(text)
    for secret in (*_parts(url), *secrets):
        text = text.replace(secret, HIDDEN)
    return "".join(letter if letter.isprintable() else " " for letter in text)


def traceback_of(error: BaseException) -> str:
    """Its traceback as the log would show it, URLs redacted: whatever raised may have put one into its message."""
    return redacted("".join(traceback.format_exception(error)).rstrip())


def _origin(found: re.Match[str]) -> str:
    scheme, user, host, path = found.groups()
    return scheme + (f"{HIDDEN}@" if user else "") + host + (f"/{HIDDEN}" if path and path != "/" else "")


def _parts(url: str) -> list[str]:
    path = urlsplit(url).path.rstrip("/") if url else ""
    *folders, last = path.split("/")
    parts = [path, last] if len(last) >= _SHORTEST else [path] if len(path) > _SHORTEST else []
    return parts + [part for part in folders if len(part) >= _SHORTEST_FOLDER]
