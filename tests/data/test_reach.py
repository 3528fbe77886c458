"""A hub that cannot be reached is named at once."""

import os
import socket
import sys
from types import SimpleNamespace

import pytest

from conf.errors import UserError
from train.data import reach, sources


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    """The answer is kept, and what it sets in the environment and in libraries is undone."""
    reach.offline_reason.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    yield
    reach.offline_reason.cache_clear()


def test_a_hub_that_refuses_or_says_nothing_is_told_by_its_reason(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert "refused" in reach.offline_reason()
    reach.offline_reason.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr(reach, "REACH_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert reach.offline_reason() in ("no answer within 0 s", "timed out")
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_dataset_that_is_not_here_is_not_looked_for_in_vain(monkeypatch):
    def load_dataset(*_, **__):
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        raise ConnectionError("Couldn't reach it")

    library = SimpleNamespace(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=ValueError))
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr(reach, "_unreachable", lambda address: "no route to host")
    with pytest.raises(UserError, match=r"cannot be reached \(no route to host\), and the dataset is not in the cache"):
        sources.open_hub("hf://wiki/text", "text", "data.path")
