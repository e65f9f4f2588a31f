"""How many replicas to ask for, so that the HPA runs at least as many as are wanted.

For an external metric of type AverageValue the HPA computes, from the metric's value v, the target per pod t and the
replicas c that the Deployment has now (ready or not)

    ratio = v / (t · c);   c stays if |ratio − 1| ≤ tolerance (0.1 unless the cluster says otherwise), else ⌈v / t⌉

(`GetExternalPerPodMetricReplicas` in Kubernetes' pkg/controller/podautoscaler/replica_calculator.go). With t = 1 and
v = 13 at c = 12 the ratio is 1.083, and the replica that the SLO needs never comes. No v gives 13: what leaves the
band is v > 13.2, and that is rounded up to 14. From 10 replicas on one more is always swallowed, so more than one are
asked for: at most ⌊c / 10⌋, where c is what runs. Downwards nothing is done: a spare replica costs, one too few
breaks the promise.
"""

from __future__ import annotations


def asked(wanted: int, current: int, tolerance: float) -> int:
    """The smallest value, with target 1, at which the HPA comes to `wanted` replicas or more from `current` ones.

    The value is whole: KEDA hands it on in thousandths, cut off, so that one a hair above the band could fall in.
    """
    if current <= 0 or wanted <= current:
        return wanted
    value = wanted
    while value / current <= 1.0 + tolerance:
        value += 1
    return value
