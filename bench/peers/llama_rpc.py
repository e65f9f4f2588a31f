"""llama.cpp's RPC backend: a server on loopback that computes some layers, and the device that stands for it.

llama-cpp-python has no words for it, so these are the C functions of ggml-rpc.h and ggml-backend.h (protocol 7.0).
"""

from __future__ import annotations

import ctypes
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.errors import ContenderError
from bench.processes import die_with_parent
from bench.sharded import free_port

_READY_S, _POLL_S = 20.0, 0.05
_CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU


def devices(threads: int) -> Any:
    """Start a server with so many threads; its device, in an array that ends with null. It dies with this process.

    Raises `ContenderError`.
    """
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", __name__, str(port), str(threads)])  # noqa: S603
    _wait(server, port)
    base, rpc = _library("ggml-base"), _library("ggml-rpc")
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    rpc.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    base.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
    base.ggml_backend_reg_dev_get.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    register = rpc.ggml_backend_rpc_add_server(f"127.0.0.1:{port}".encode())
    if not register:
        raise ContenderError("llama.cpp's RPC server offers no device")
    return (ctypes.c_void_p * 2)(base.ggml_backend_reg_dev_get(register, 0), None)


def serve(port: int, threads: int) -> None:
    """Compute for whoever connects, on the processor, until killed."""
    die_with_parent()
    ggml, rpc = _library("ggml"), _library("ggml-rpc")
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_by_type.argtypes = [ctypes.c_int]
    device = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(_CPU))
    start = rpc.ggml_backend_rpc_start_server
    start.restype = None
    start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    start(f"127.0.0.1:{port}".encode(), None, threads, 1, ctypes.cast(device, ctypes.c_void_p))


def _library(name: str) -> Any:
    """One of the libraries that llama-cpp-python has loaded; raises `ContenderError` if it was built without."""
    import llama_cpp

    path = Path(llama_cpp.__file__).parent / "lib" / f"lib{name}.so"
    if not path.exists():
        raise ContenderError("llama.cpp was built without its RPC backend (CMAKE_ARGS=-DGGML_RPC=ON)")
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    """Return once the server listens; raises `ContenderError`."""
    ends = time.monotonic() + _READY_S
    while server.poll() is None and time.monotonic() < ends:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), _POLL_S):
            return
        time.sleep(_POLL_S)
    raise ContenderError("llama.cpp's RPC server did not start")


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
