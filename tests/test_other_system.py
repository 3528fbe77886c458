"""What is told on a system that is not Linux: one line, by the command and by the module."""

import subprocess
import sys

from conf.errors import EXIT_USER
from conf.schema import ROOT
from tests.small import environment

ELSEWHERE = "import runpy, sys; sys.platform = 'darwin'; sys.argv = ['train', 'steps=1']; "


def told(code: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE + code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    return done.returncode, done.stderr


def test_a_command_ends_with_one_line():
    code, said = told("runpy.run_module('train', run_name='__main__', alter_sys=True)")
    assert code == EXIT_USER and len(said.splitlines()) == 1
    assert said.startswith("error: Sluice runs only on Linux, and this system is darwin")


def test_the_module_raises():
    code, said = told("import train; train.compose")
    assert code == 1 and "ImportError: Sluice runs only on Linux" in said
