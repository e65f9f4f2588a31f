"""Starts one process of the bundle so that it cannot outlive its parent.

Run as a file, `python child.py PARENT_PID COMMAND…`: asks the kernel for SIGTERM when the parent dies, then becomes
the command. An own small program, because between fork and exec nothing else is safe in a process with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def tie_to_parent(parent_pid: int) -> None:
    """Ask for SIGTERM at the parent's death (Linux; elsewhere the process group must do)."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        sys.exit("the parent was gone before the process began")


def main() -> None:
    """Tie, then exec."""
    tie_to_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 - the command comes from stack.yml, and no shell is meant


if __name__ == "__main__":
    main()
