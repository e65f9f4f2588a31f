"""What a function says when it does not answer, in OpenAI's error shape.

    ApiError            status, message, field (`param`), code
    ├── RefusedError         4xx: the request is at fault; `param` names the field
    │   └── UnauthorisedError    401: it bears no key of ours
    ├── OverloadedError      429/503 with Retry-After: not admitted, come back later
    ├── BrokenOffError     5xx: the answer could not be finished
    └── ClientLeftError    499: nobody reads the answer any more; for the metrics only

`models`' tree is translated once, in `from_prompt_error`; werkzeug's once, in `from_http`.
"""

from __future__ import annotations

from typing import Any

from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound, RequestEntityTooLarge

from models.errors import PromptError, PromptTooLongError

_PARAM_LIMIT = 80


class ApiError(Exception):
    """Base: one sentence for the caller, and what HTTP needs to carry it."""

    type = "api_error"

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param[:_PARAM_LIMIT] if param else None
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        return {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}


class RefusedError(ApiError):
    """The request cannot be served as it is."""

    type = "invalid_request_error"


class UnauthorisedError(RefusedError):
    """The request bears no key of ours."""

    def __init__(self) -> None:
        message = "an API key is needed: send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
        super().__init__(401, message, code="invalid_api_key")

    def headers(self) -> dict[str, str]:
        """RFC 9110, 11.6.1: a 401 says how to log in."""
        return {"WWW-Authenticate": "Bearer"}


class OverloadedError(ApiError):
    """Not admitted: full, starting or stopping."""

    type = "overloaded_error"


class BrokenOffError(ApiError):
    """Admitted, and then something broke."""

    type = "server_error"


class ClientLeftError(ApiError):
    """The caller hung up; the reply goes nowhere."""

    def __init__(self) -> None:
        super().__init__(499, "the client left", code="client_left")


def from_prompt_error(error: PromptError, param: str | None) -> RefusedError:
    """Translate what a tier says about a prompt; `param` is the field as the caller knows it."""
    if isinstance(error, PromptTooLongError):
        return RefusedError(400, str(error), param=param, code="context_length_exceeded")
    return RefusedError(422, str(error), param=param, code="invalid_value")


def from_http(error: HTTPException, max_body_bytes: int) -> ApiError:
    """Translate what werkzeug raises while it routes and reads."""
    status = error.code or 500
    if isinstance(error, RequestEntityTooLarge):
        message = f"the body is larger than {max_body_bytes} bytes; send less"
        return RefusedError(status, message, param="body", code="body_too_large")
    if isinstance(error, NotFound):
        message = "there is no such route; GET /openapi.json lists them"
        return RefusedError(status, message, param="path", code="unknown_route")
    if isinstance(error, MethodNotAllowed):
        allowed = ", ".join(sorted(error.valid_methods or []))
        message = f"this route does not take the method; use {allowed}"
        return RefusedError(status, message, param="method", code="bad_method")
    kind = RefusedError if status < 500 else BrokenOffError  # noqa: PLR2004
    return kind(status, error.name, code=error.name.lower().replace(" ", "_"))
