"""What an exchange between two functions puts on the wire, as far as httpx shows it: lines, headers and bodies."""

from __future__ import annotations

import httpx


def request_bytes(request: httpx.Request) -> int:
    """Bytes of a request."""
    line = len(request.method) + len(request.url.raw_path) + len("  HTTP/1.1\r\n")
    return line + _header_bytes(request.headers) + len(request.content)


def response_bytes(response: httpx.Response) -> int:
    """Bytes of a response, as far as it was read."""
    line = len(f"{response.http_version} {response.status_code} {response.reason_phrase}\r\n")
    return line + _header_bytes(response.headers) + response.num_bytes_downloaded


def _header_bytes(headers: httpx.Headers) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers.raw) + 2
