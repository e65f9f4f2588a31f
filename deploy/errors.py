"""The exception tree of `deploy`.

DeployError
├── StackError      stack.yml cannot be read, or names what is not there
├── ManifestError   a Kubernetes manifest or kustomization cannot be read, or names what is not there
├── ImageError      an image cannot be built
└── StartError      a process of the bundle did not start, or did not get ready
"""


class DeployError(Exception):
    """Base of all errors raised by `deploy`; the message is one sentence that says what to do."""


class StackError(DeployError):
    """stack.yml is missing, malformed, or does not have what was asked for."""


class ImageError(DeployError):
    """No engine to build with, something is missing in the build context, or the build failed."""


class StartError(DeployError):
    """A process ended before it was ready, or took too long."""


class ManifestError(DeployError):
    """A file under deploy/kubernetes is missing or malformed, or there is no overlay of that name."""
