"""A command ends with its own exit code, even if a library or Python itself would need long to shut down."""

import subprocess
import sys

import pytest

from cluster.driver.ray_backend import RayFleet
from conf.errors import EXIT_STOPPED
from conf.schema import ROOT

CODE = """
import atexit, sys, time
from cluster.interrupts import cut_short, leave
class Left:
    def __del__(self): print("taken apart")
left = Left()
atexit.register(lambda: (time.sleep({seconds}), print("said goodbye")))
print("all is told")
{cut}
sys.exit(leave(75))
"""


@pytest.mark.parametrize(("cut", "seconds", "said"), [("cut_short()", 300, ""), ("", 0, "said goodbye\n")])
def test_a_command_ends_at_once_where_a_farewell_would_be_in_vain(cut, seconds, said):
    command = [sys.executable, "-c", CODE.format(cut=cut, seconds=seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (EXIT_STOPPED, f"all is told\n{said}")


def test_a_program_that_calls_the_command_ends_as_it_says_itself():
    code = "import sys; sys.argv[1:] = ['--version']; from train.__main__ import command; command(); sys.exit(7)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120).returncode == 7


def test_a_driver_without_rays_head_waits_for_no_farewell(monkeypatch):
    told = []
    monkeypatch.setattr("cluster.driver.ray_backend.cut_short", lambda: told.append(True))
    fleet = RayFleet.__new__(RayFleet)
    fleet._next, fleet._actors, fleet._headless = [], {}, True
    fleet.close()
    assert told == [True]
