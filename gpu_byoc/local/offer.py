"""What a worker says of itself when it registers: the body of ``POST /capability/register``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final

from gpu_byoc.config import is_plain_url
from gpu_byoc.errors import BadRequest

MAX_TEXT: Final = 4096
INT64: Final = 1 << 63

CURRENCIES: Final = ("wei", "eth")
"""Any other needs a price feed, which is a thing of the chain."""


@dataclass(frozen=True, slots=True)
class Offer:
    """The fields are go-livepeer's, and so are their defaults; ``price_per_unit`` / ``price_scaling`` is the price of a
    second in ``currency``. ``token`` is shown to the worker with each job; "" if it asks for none."""

    name: str
    url: str
    capacity: int = 0
    description: str = ""
    price_per_unit: int = 0
    price_scaling: int = 1
    currency: str = "wei"
    token: str = field(default="", repr=False)


def read_offer(body: bytes) -> Offer:
    """Stricter than go-livepeer: a name, and a URL that jobs can be sent to. Raises BadRequest, naming the field."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequest("the body is not a JSON object")
    texts = {name: _text(value, name) for name in ("name", "url", "description", "currency", "token")}
    numbers = {name: _number(value, name) for name in ("capacity", "price_per_unit", "price_scaling")}
    name, url, token = texts["name"], texts["url"].rstrip("/"), texts["token"]
    if not name or name != name.strip() or not name.isprintable():
        raise BadRequest("name: it travels in a header; no spaces around it, only what can be printed")
    if not is_plain_url(url):
        raise BadRequest("url: not a URL like http://worker:8000, where jobs can be sent to")
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise BadRequest("token: it travels in a header; printable ASCII without spaces")
    currency = texts["currency"].lower() or "wei"
    if currency not in CURRENCIES:
        raise BadRequest(f"currency: {' or '.join(CURRENCIES)}; there is no price feed here")
    return Offer(
        name=name,
        url=url,
        capacity=numbers["capacity"],
        description=texts["description"],
        price_per_unit=numbers["price_per_unit"],
        price_scaling=numbers["price_scaling"] or 1,
        currency=currency,
        token=token,
    )


def _text(value: dict[str, Any], name: str) -> str:
    text = value.get(name)
    if text is None:
        return ""
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise BadRequest(f"{name}: not a text of at most {MAX_TEXT} characters")
    return text


def _number(value: dict[str, Any], name: str) -> int:
    number = value.get(name)
    if number is None:
        return 0
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < INT64:
        raise BadRequest(f"{name}: not a whole number from 0 up")
    return number
