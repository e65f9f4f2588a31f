"""What KEDA calls. Methods only read: another object (`gatherer`) looks at the cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from scaler import externalscaler_pb2 as wire
from scaler.errors import CrowdedError, MetadataError, ScalerError, SourceError
from scaler.externalscaler_pb2_grpc import ExternalScalerServicer
from scaler.gatherer import Answer, Gatherer
from scaler.trigger import Trigger, parse

TARGET = 1
"""With AverageValue and target 1 the metric's value is the number of replicas."""
_CODES = {
    MetadataError: grpc.StatusCode.INVALID_ARGUMENT,
    CrowdedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SourceError: grpc.StatusCode.UNAVAILABLE,
}
_LOOK_EVERY_S = 1.0
"""How often a stream looks whether its caller is still there."""

Counts = Callable[[str, str], None]
"""Is told a call's method and how it ended."""


class Service(ExternalScalerServicer):
    """Answers out of a gatherer; `max_streams` callers may wait for changes at a time."""

    def __init__(self, gatherer: Gatherer, max_streams: int, counts: Counts) -> None:
        self._gatherer = gatherer
        self._streams = threading.BoundedSemaphore(max_streams)
        self._counts = counts

    def IsActive(self, request: wire.ScaledObjectRef, context: grpc.ServicerContext) -> wire.IsActiveResponse:
        """Whether any replica is wanted: the metric's own rule."""
        with self._call("IsActive", context):
            return wire.IsActiveResponse(result=self._answer(request).active)

    def StreamIsActive(
        self, request: wire.ScaledObjectRef, context: grpc.ServicerContext
    ) -> Iterator[wire.IsActiveResponse]:
        """Whether any is wanted, once it is known and each time that changes; silent while nothing is known."""
        with self._call("StreamIsActive", context):
            trigger, active = _trigger(request), None
            if not self._streams.acquire(blocking=False):
                raise CrowdedError("too many streams are open; see SCALER_MAX_STREAMS")
            try:
                while context.is_active() and not self._gatherer.stopped:
                    changed = self._gatherer.await_change(trigger, active, _LOOK_EVERY_S)
                    if changed is not None and changed != active:
                        active = changed
                        yield wire.IsActiveResponse(result=active)
            finally:
                self._streams.release()

    def GetMetricSpec(self, request: wire.ScaledObjectRef, context: grpc.ServicerContext) -> wire.GetMetricSpecResponse:
        """The metric's name and its target; needs no source, so that KEDA can set the HPA up before there is one."""
        with self._call("GetMetricSpec", context):
            name = _trigger(request).metric_name
            spec = wire.MetricSpec(metricName=name, targetSize=TARGET, targetSizeFloat=float(TARGET))
            return wire.GetMetricSpecResponse(metricSpecs=[spec])

    def GetMetrics(self, request: wire.GetMetricsRequest, context: grpc.ServicerContext) -> wire.GetMetricsResponse:
        """The replicas to ask for."""
        with self._call("GetMetrics", context):
            name = _trigger(request.scaledObjectRef).metric_name
            if request.metricName != name:
                raise MetadataError("metricName", f"is not known; this trigger has {name}")
            value = self._answer(request.scaledObjectRef).value
            metric = wire.MetricValue(metricName=name, metricValue=value, metricValueFloat=float(value))
            return wire.GetMetricsResponse(metricValues=[metric])

    def _answer(self, request: wire.ScaledObjectRef) -> Answer:
        return self._gatherer.answer(_trigger(request))

    @contextmanager
    def _call(self, method: str, context: grpc.ServicerContext) -> Iterator[None]:
        """The border: our errors become codes here, and calls are counted."""
        ended = "OK"
        try:
            yield
        except ScalerError as error:
            code = _CODES[type(error)]
            ended = code.name
            context.abort(code, str(error))
        except GeneratorExit:
            ended = "CANCELLED"
            raise
        finally:
            self._counts(method, ended)


def _trigger(request: wire.ScaledObjectRef) -> Trigger:
    return parse(request.scalerMetadata, request.namespace)
