"""One bounded GET; its failures are ours."""

from __future__ import annotations

from collections.abc import Mapping

import httpx

from scaler.errors import SourceError

MOST_BYTES = 32 << 20


def text(client: httpx.Client, url: str, what: str, params: Mapping[str, str] | None = None) -> str:
    """The body of a successful answer; raises `SourceError`, which names `what` and never the address."""
    body = bytearray()
    try:
        with client.stream("GET", url, params=params) as answer:
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise SourceError(f"{what} answered with more than {MOST_BYTES >> 20} MiB")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SourceError(f"{what} did not answer ({type(error).__name__})") from error
    if not answer.is_success:
        raise SourceError(f"{what} answered {answer.status_code}")
    return body.decode("utf-8", "replace")
