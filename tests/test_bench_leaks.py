"""`bench leaks`: what counts as a leak, and what a process group holds."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from bench.leaks import Figures, Held
from bench.processes import of_groups

BEFORE = Held(files=70, threads=30, sessions=0, resident_bytes=9_000_000)


@pytest.mark.parametrize(
    ("after", "no_leak"),
    [
        (BEFORE, True),
        (replace(BEFORE, files=60, threads=29), True),
        (replace(BEFORE, threads=31, resident_bytes=20_000_000), True),
        (replace(BEFORE, files=71), False),
        (replace(BEFORE, sessions=1), False),
    ],
)
def test_files_and_sessions_must_not_grow(after: Held, no_leak: bool) -> None:
    found = Figures(10, 5, 0, BEFORE, after).as_dict()
    assert found["verdict"] == {"no_leak": no_leak, "no_failure": True}


def test_a_refused_request_is_a_failure() -> None:
    assert Figures(10, 5, 1, BEFORE, BEFORE).as_dict()["verdict"] == {"no_leak": True, "no_failure": False}


def test_the_processes_of_a_group_are_found_while_they_live() -> None:
    program = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert [folder.name for folder in of_groups([child.pid])] == [str(child.pid)]
        child.kill()
    assert not list(of_groups([child.pid]))
    assert str(os.getpid()) in {folder.name for folder in of_groups([os.getpgrp()])}
