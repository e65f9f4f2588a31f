"""The exception tree of `deploy`.

DeployError
├── StackError      stack.yml cannot be read, or names what is not there
├── ManifestError   a Kubernetes manifest or kustomization cannot be read, or names what is not there
├── ImageError      an image cannot be built
├── StartError      a process of the bundle did not start, or did not get ready
├── RecipeError     a Greengrass component that cannot be made, or that a nucleus would reject
└── CloudError      AWS refused, cannot be reached, or says that something failed
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


class RecipeError(DeployError):
    """A Greengrass component cannot be made of what is there, or a nucleus would reject it."""


class CloudError(DeployError):
    """AWS refused, did not answer, or reports a failure."""
