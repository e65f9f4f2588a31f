"""What can go wrong with what is kept.

StoreError          the store cannot be reached; nothing was changed
ConflictError       the id is taken by something else
DeletedError        the conversation was deleted and takes nothing more
FullError           there is no more room
"""

from __future__ import annotations

from functions.serving.errors import ApiError, OverloadedError, RefusedError


class StoreError(Exception):
    """The store cannot be reached; nothing was changed."""


class ConflictError(Exception):
    """The id is taken by something else."""


class DeletedError(Exception):
    """The conversation was deleted and takes nothing more."""


class FullError(Exception):
    """There is no more room."""


STORE_ERRORS = (StoreError, ConflictError, DeletedError, FullError)


def translate(error: Exception) -> ApiError:
    """What the caller is told; `STORE_ERRORS` only."""
    if isinstance(error, ConflictError):
        message = "id: it was used before for something else; give each event an id of its own"
        return RefusedError(409, message, param="id", code="id_taken")
    if isinstance(error, DeletedError):
        message = "conversation: it was deleted; begin another one"
        return RefusedError(410, message, param="conversation", code="conversation_deleted")
    if isinstance(error, FullError):
        message = "as many questions wait for the edge as may; come back later"
        return OverloadedError(429, message, code="store_full", retry_after_s=60)
    message = "the store cannot be reached; nothing was changed, so send it again, with the same id"
    return OverloadedError(503, message, code="store_unavailable", retry_after_s=1)
