"""SIGINT and SIGTERM end a process in the foreground, whatever they interrupt."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INTERRUPTED = """
import os, sys
from scaler.stopping import stop_on_signals

stop = stop_on_signals()
with stop._cond:  # as inside `stop.wait`, between two of its steps
    os.kill(os.getpid(), int(sys.argv[1]))
sys.exit(0 if stop.wait(20) else 1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_midst_of_a_wait_is_heard(number):
    words = [sys.executable, "-c", INTERRUPTED, str(number.value)]
    assert subprocess.run(words, cwd=ROOT, timeout=30, check=False).returncode == 0
