"""An error or a dead process is described by one line that says why."""

import pytest

from bench.gpu.words import last_words, reason_of, shortened
from conf.schema import ROOT

RANK = """[rank0]: Traceback (most recent call last):
[rank0]:   File "<frozen runpy>", line 198, in _run_module_as_main
[rank0]:   File "{root}/bench/gpu/rank.py", line 115, in main
[rank0]: RuntimeError: CUDA error: out of memory
[rank0]: Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
[rank0]:
"""


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (1, RANK, "exit code 1: RuntimeError: CUDA error: out of memory"),
        (2, "  precision = fp8\n  rule: needs nvcc\n\n", "exit code 2: precision = fp8; rule: needs nvcc"),
        (3, "", "exit code 3: it said nothing"),
        (-11, 'Fatal Python error: Segmentation fault\n  File "{root}/train/optim.py", line 9 in step', "SIGSEGV [train/optim.py:9]"),
        (1, 'Timeout (0:01:00)!\n  File "{root}/train/optim.py", line 9 in step', "hung, and was ended after its time [train/optim.py:9]"),
    ],
    ids=["rank", "user", "silent", "signal", "hung"],
)  # fmt: skip
def test_a_dead_process_is_told_by_its_error(code, said, words):
    assert words in last_words(code, said.replace("{root}", str(ROOT)))


def test_an_error_has_its_place_and_no_folder_of_the_machine():
    try:
        raise RuntimeError(f"in {ROOT}/train/optim.py\n" + "x" * 5000)
    except RuntimeError as error:
        reason = reason_of(error)
    assert reason.startswith("RuntimeError: in train/optim.py") and "test_words.py:" in reason
    assert str(ROOT) not in reason and len(reason) < 800 and "\n" not in reason
    assert shortened("a\n b") == "a b"
