"""The exception tree of `bench`.

BenchError
├── ContenderError    a contender of `bench engine` that could not be prepared, opened or measured
├── QueryFileError    a file of queries that cannot be used
├── ServiceError      the service under test cannot be reached, or refused a request
└── TraceFileError    a trace of arrivals that cannot be used
"""


class BenchError(Exception):
    """Base of all errors raised by `bench`; the message is one sentence that says what to do."""


class ContenderError(BenchError):
    """A contender's process ended before it answered."""


class QueryFileError(BenchError):
    """A line of a query file is not what it should be."""


class ServiceError(BenchError):
    """The service did not answer as it should; `status` is its HTTP status, or None without an answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class TraceFileError(BenchError):
    """A trace's file, or a line of it, is not what it should be."""
