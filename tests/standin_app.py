"""A stand-in function for the deployers' tests: says what it was sent, streams, dawdles, dies."""

import json
import os
import signal
import time
from pathlib import Path


def app(environ, start_response):
    path = environ["PATH_INFO"]
    body = environ["wsgi.input"].read()
    if path == "/die":
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    if path == "/stream":
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return pieces(float(environ.get("HTTP_X_GAP_S", "0")))
    if path == "/slow":
        Path(environ["HTTP_X_MARK"]).touch()
        time.sleep(1.0)
    if path == "/_/ready" and os.environ.get("NEVER_READY"):
        start_response("503 Service Unavailable", [("Content-Length", "0")])
        return [b""]
    said = json.dumps(
        {
            "name": os.environ.get("NAME"),
            "method": environ["REQUEST_METHOD"],
            "path": environ.get("RAW_URI"),
            "body": body.decode("utf-8"),
            "pid": os.getpid(),
            "master": os.getppid(),
            "chunked": environ.get("HTTP_TRANSFER_ENCODING") == "chunked",
            "call_id": environ.get("HTTP_X_CALL_ID"),
            "start_time": environ.get("HTTP_X_START_TIME"),
            "connection": environ.get("HTTP_CONNECTION"),
            "environment": dict(os.environ),
        }
    ).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(said)))])
    return [said]


def pieces(gap_s):
    for i in range(3):
        yield f"data: {i}\n\n".encode()
        time.sleep(gap_s)
