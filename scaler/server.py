"""Wires the scaler and runs it until it is told to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import start_http_server

from scaler import externalscaler_pb2 as wire
from scaler.capacity import Capacity
from scaler.errors import SettingsError
from scaler.externalscaler_pb2_grpc import add_ExternalScalerServicer_to_server
from scaler.gatherer import Bounds, Decides, Gatherer, Looks
from scaler.metrics import Metrics
from scaler.replicas import ListedReplicas, Replicas
from scaler.service import Service
from scaler.settings import KUBERNETES, Settings, Tls
from scaler.signals.pages import PageSource
from scaler.signals.prometheus import PrometheusSource
from scaler.signals.source import Source
from scaler.signals.summary import summarise
from scaler.stopping import stop_on_signals
from scaler.trigger import Trigger
from scaler.values import Reading, Target

MOST_MESSAGE_BYTES = 64 * 1024
MOST_HEADER_BYTES = 8 * 1024
SOURCE_TIMEOUT_S = 3.0
_WORKERS = 8
_WAITING_CALLS = 256
SERVICE_NAME = wire.DESCRIPTOR.services_by_name["ExternalScaler"].full_name
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """One trigger's signals and replicas."""

    trigger: Trigger
    source: Source
    replicas: Replicas

    def look(self, now_s: float) -> Reading:
        """Look once; raises `SourceError`."""
        found = self.replicas.of(self.trigger.function, self.trigger.namespace)
        return summarise(self.source.read(found.replicas, now_s), found, self.trigger, now_s)


class Scaler:
    """The server and all that belongs to it. `replicas` and `capacity` are handed in by tests only."""

    def __init__(
        self,
        settings: Settings,
        replicas: Replicas | None = None,
        capacity: Callable[[Target], Decides] = Capacity,
    ) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self._client = httpx.Client(timeout=SOURCE_TIMEOUT_S, trust_env=False, follow_redirects=False)
        self._replicas = replicas or _replicas(settings, self._client)
        self._capacity = capacity
        bounds = Bounds(settings.poll_s, settings.forget_s, settings.max_triggers)
        self.gatherer = Gatherer(self._open, self._metrics, bounds)
        self._health = health.HealthServicer()
        self._server = self._make_server()
        self._close_metrics: Callable[[], None] = lambda: None
        self.port = 0

    def start(self) -> None:
        """Listen and look; raises `SettingsError` if a port or a key file cannot be used."""
        self.port = self._bind()
        try:
            self._close_metrics = self._show_metrics()
        except OSError as error:
            raise SettingsError(f"SCALER_METRICS_PORT cannot be used ({error.strerror})") from error
        self.gatherer.start()
        self._server.start()
        for service in ("", SERVICE_NAME):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> None:
        """Say so to whoever asks for health, end the streams, let calls finish, close."""
        self._health.enter_graceful_shutdown()
        self.gatherer.stop()
        self._server.stop(self._settings.drain_s).wait()
        self._close_metrics()
        self._client.close()

    def _show_metrics(self) -> Callable[[], None]:
        """Serve our own metrics; gives what ends that. Raises `OSError`."""
        host = self._settings.host.strip("[]")
        # "::" fails where there is no IPv6, other than with gRPC.
        everywhere, registry = {"", "::"}, self._metrics.registry
        address = "0.0.0.0" if host in everywhere else host  # noqa: S104 - Prometheus comes from outside the pod
        server, _ = start_http_server(self._settings.metrics_port, address, registry)

        def close() -> None:
            server.shutdown()
            server.server_close()

        return close

    def _open(self, trigger: Trigger) -> tuple[Looks, Decides]:
        source: Source = (
            PrometheusSource(self._client, trigger) if trigger.prometheus else PageSource(self._client, trigger)
        )
        return Look(trigger, source, self._replicas), self._capacity(trigger.target)

    def _make_server(self) -> grpc.Server:
        streams = self._settings.max_streams
        server = grpc.server(
            ThreadPoolExecutor(_WORKERS + streams, thread_name_prefix="call"),
            maximum_concurrent_rpcs=_WORKERS + streams + _WAITING_CALLS,
            options=[
                ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES),
                ("grpc.max_metadata_size", MOST_HEADER_BYTES),
                ("grpc.absolute_max_metadata_size", 2 * MOST_HEADER_BYTES),
                ("grpc.max_concurrent_streams", 2 * streams),
                ("grpc.so_reuseport", 0),  # a port that is taken is an error
            ],
        )
        service = Service(self.gatherer, streams, self._metrics.call)
        add_ExternalScalerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        return server

    def _bind(self) -> int:
        address, tls = f"{self._settings.host}:{self._settings.port}", self._settings.tls
        try:
            if tls is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, _credentials(tls))
        except RuntimeError as error:
            raise SettingsError(f"SCALER_PORT {self._settings.port} cannot be used, or the TLS files cannot") from error


def serve(settings: Settings) -> None:
    """Run until SIGTERM or Ctrl-C, then drain; raises `SettingsError`. Call it from the main thread."""
    stop = stop_on_signals()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each look is too much
    scaler = Scaler(settings)
    scaler.start()
    _LOG.info("listening on port %d%s", scaler.port, "" if settings.tls else ", without TLS")
    stop.wait()
    _LOG.info("stopping")
    scaler.stop()


def _replicas(settings: Settings, client: httpx.Client) -> Replicas:
    if settings.replicas != KUBERNETES:
        return ListedReplicas(settings.replicas, client)
    from scaler.kubernetes_replicas import connect  # takes a second to import, and local runs do without

    return connect(settings.power_nodes)


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    """Files are read at each handshake, so that certificates can be renewed while the scaler runs."""

    def read() -> grpc.ServerCertificateConfiguration:
        pair = [(tls.key.read_bytes(), tls.certificate.read_bytes())]
        return grpc.ssl_server_certificate_configuration(pair, _read(tls.client_ca))

    def read_again() -> grpc.ServerCertificateConfiguration | None:
        try:
            return read()
        except OSError as error:
            _LOG.warning("the TLS files cannot be read (%s); the ones before are used", error.strerror)
            return None

    return grpc.dynamic_ssl_server_credentials(
        read(),
        read_again,  # type: ignore[arg-type]  # None: as before
        require_client_authentication=bool(tls.client_ca),
    )


def _read(path: Path | None) -> bytes | None:
    return path.read_bytes() if path else None
