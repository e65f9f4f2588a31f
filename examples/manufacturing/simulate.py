"""Send readings of made-up machines to a broker; one of them breaks."""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np

from examples.manufacturing.signals import FAULTS, reading


def main(arguments: list[str] | None = None) -> int:
    """Send `--readings` of each machine; `press-4` has the fault from the middle on."""
    parser = argparse.ArgumentParser(description="Send readings of made-up machines.")
    parser.add_argument("--broker", default="127.0.0.1:1883", help="host:port")
    parser.add_argument("--fault", choices=FAULTS, default="bearing")
    parser.add_argument("--readings", type=int, default=10)
    parser.add_argument("--every-s", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    try:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion
    except ModuleNotFoundError:
        print("simulate: it needs paho-mqtt: pip install -e '.[mqtt]'", file=sys.stderr)
        return 1
    host, _, port = given.broker.rpartition(":")
    client, rng = Client(CallbackAPIVersion.VERSION2), np.random.default_rng(given.seed)
    try:
        client.connect(host, int(port))
    except (OSError, ValueError) as error:
        print(f"simulate: no broker at {given.broker}: {error}", file=sys.stderr)
        return 1
    client.loop_start()
    for number in range(given.readings):
        for machine in ("press-3", "press-4"):
            is_broken = machine == "press-4" and number >= given.readings // 2
            said = json.dumps(reading(rng, given.fault if is_broken else ""))
            client.publish(f"plant/{machine}/reading", said, qos=1).wait_for_publish(timeout=5)
        time.sleep(given.every_s)
    client.loop_stop()
    client.disconnect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
