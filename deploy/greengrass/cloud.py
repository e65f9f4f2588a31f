"""The border to AWS: three clients, and every error of theirs turned into one sentence, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deploy.errors import CloudError

_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})
_WRONG = frozenset(
    {"InvalidClientTokenId", "UnrecognizedClientException", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
)
_DENIED = frozenset({"AccessDenied", "AccessDeniedException", "403"})
_BUSY = frozenset({"ThrottlingException", "SlowDown", "ServiceUnavailable", "InternalServerException", "InternalError"})
MISSING = frozenset({"ResourceNotFoundException", "NoSuchKey", "NoSuchBucket", "404", "NotFound"})
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S, _ATTEMPTS = 5, 30, 3


class MissingError(CloudError):
    """What was asked for is not there."""


class ConflictError(CloudError):
    """A component version of that name is there already."""


@dataclass(frozen=True)
class Cloud:
    """The clients of one account and region."""

    s3: Any
    greengrass: Any
    account: str
    partition: str
    region: str

    def component_arn(self, name: str, version: str) -> str:
        """The ARN of one version of a component of this account."""
        return f"arn:{self.partition}:greengrass:{self.region}:{self.account}:components:{name}:versions:{version}"


def connect(region: str = "", profile: str = "") -> Cloud:
    """Make the clients from boto3's own settings (environment, ~/.aws); raises `CloudError`.

    Asks STS who we are, so that credentials that do not hold are found before anything else is done.
    """
    try:
        import boto3
        from botocore.config import Config
    except ModuleNotFoundError as error:
        raise CloudError("edgecascade greengrass needs boto3: pip install 'edgecascade[greengrass]'") from error
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
    )
    with asked("signing in"):
        session = boto3.Session(region_name=region or None, profile_name=profile or None)
        sts, s3, greengrass = (session.client(name, config=config) for name in ("sts", "s3", "greengrassv2"))
        arn = sts.get_caller_identity()["Arn"]
    _, partition, _, _, account = arn.split(":")[:5]
    return Cloud(s3, greengrass, account, partition, greengrass.meta.region_name)


def pages(client: Any, operation: str, field: str, **arguments: Any) -> list[dict[str, Any]]:
    """Everything that a listing operation has, over all its pages; use inside `asked`."""
    found: list[dict[str, Any]] = []
    for page in client.get_paginator(operation).paginate(**arguments):
        found.extend(page.get(field, []))
    return found


@contextmanager
def asked(what: str) -> Iterator[None]:
    """Translate what boto3 raises while `what` is done; raises `CloudError`."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _refused(what, error.response) from error
    except Boto3Error as error:  # an upload's: what was refused stands behind it
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ClientError):
            raise _refused(what, cause.response) from error
        raise CloudError(f"{what} failed: {error}") from error
    except BotoCoreError as error:
        raise CloudError(f"{what} failed: {_lost(error)}") from error


def _refused(what: str, response: dict[str, Any]) -> CloudError:
    said = response.get("Error", {})
    code, message = said.get("Code", "unknown"), said.get("Message", "")
    if code in _EXPIRED:
        return CloudError(f"{what} failed: the credentials have expired ({code}); sign in, then repeat the command")
    if code in _WRONG:
        return CloudError(f"{what} failed: the credentials are not valid ({code}); check AWS_PROFILE and the keys")
    if code in _DENIED:
        return CloudError(f"{what} failed: these credentials may not do that ({code}); {message or 'see their policy'}")
    if code in _BUSY:
        return CloudError(f"{what} failed: AWS is busy ({code}); repeat the command later")
    kind = MissingError if code in MISSING else ConflictError if code == "ConflictException" else CloudError
    return kind(f"{what} failed: {message or 'AWS gives no reason'} ({code})")


def _lost(error: Exception) -> str:
    from botocore import exceptions

    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return "there are no credentials; set AWS_PROFILE, or sign in"
    if isinstance(error, exceptions.NoRegionError):
        return "no region is named; use --region or AWS_REGION"
    if isinstance(error, exceptions.ProfileNotFound):
        return f"{error}; see ~/.aws/config"
    if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError):
        return f"AWS cannot be reached or hung up ({type(error).__name__}); repeat the command, it goes on where it was"
    return f"{error} ({type(error).__name__})"
