"""The exception tree of `models`.

    ModelError
    ├── SourceError      a model file or folder that cannot be read (missing, truncated, foreign)
    ├── ArtifactError    a tier on disk that is incomplete, altered or of another schema
    │   └── SealError         sealed or signed, and not by whom or as it should be
    ├── KeyUnavailableError   a key that cannot be read, or that its provider does not hand out
    ├── DataError        a data set, skill or label that is not what it should be
    ├── PromptError      a prompt the model cannot take (`field` names the culprit)
    │   ├── PromptTooLongError
    │   └── GrammarError     a form of answer that cannot be kept to
    ├── LinkLostError    a shard that was asked is gone, or takes no session; another may
    ├── ShardsLostError  no shard is left that serves the layers that come next
    ├── RankLostError    one of several ranks failed in the midst of a pass
    └── AbandonedError   the caller said that nobody waits for the answer any more

Each border (HTTP, command line) translates this tree once.
"""


class ModelError(Exception):
    """Base of all errors raised by `models`; the message is one sentence that says what to do."""


class SourceError(ModelError):
    """A model source cannot be read."""


class ArtifactError(ModelError):
    """A tier artifact cannot be opened."""


class SealError(ArtifactError):
    """A seal or a signature does not hold."""


class KeyUnavailableError(ModelError):
    """There is no key to try; the message never holds one."""


class DataError(ModelError):
    """A data set or a label inventory is not usable."""


class PromptError(ModelError):
    """A prompt that the tier cannot take; `field` is the request field to blame."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class PromptTooLongError(PromptError):
    """The prompt leaves no room for an answer in the model's context."""


class GrammarError(PromptError):
    """The form that an answer is to have cannot be compiled, or cannot be kept to."""


class LinkLostError(ModelError):
    """A shard was asked and is gone, or refused the session."""


class ShardsLostError(ModelError):
    """No shard is left that serves the layers that come next; the answer cannot be finished."""


class RankLostError(ModelError):
    """Another rank failed, so that this one's sums stay incomplete."""


class AbandonedError(ModelError):
    """Nobody waits for the answer any more; it was not finished."""
