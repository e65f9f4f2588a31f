"""The connection to Kubernetes' API that everything here shares."""

from __future__ import annotations

from kubernetes import client, config
from kubernetes.config.config_exception import ConfigException

from scaler.errors import SettingsError


def connect() -> client.ApiClient:
    """By the pod's service account, else by the kubeconfig; raises `SettingsError` if there is neither.

    It tries nothing twice: whoever asks has a rhythm of its own.
    """
    settings = client.Configuration()
    try:
        config.load_incluster_config(settings)
    except ConfigException:
        try:
            config.load_kube_config(client_configuration=settings)
        except (ConfigException, OSError) as error:
            raise SettingsError(
                "there is neither a service account nor a kubeconfig here to reach Kubernetes by; "
                "run it in the cluster, or set KUBECONFIG"
            ) from error
    settings.retries = 0
    return client.ApiClient(settings)
