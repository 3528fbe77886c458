"""log.prometheus: the newest numbers in Prometheus' text format, and an error where the port is taken."""

import math
import socket
import threading
import time
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from conf.errors import UserError
from conf.load import compose
from train.show.prometheus import MOST_CONNECTIONS, PrometheusSink, prometheus_text, require_port
from train.show.writer import open_writer


def test_the_newest_step_is_told_and_nothing_else(tmp_path):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    words = ["conf=tiny", "steps=2", "name=mine", "log.wandb=disabled", f"log.prometheus={port}"]
    with open_writer(compose(*words), tmp_path) as writer:
        for step in (1, 2):
            writer.write({"step": step, "main_loss": 2.5, "load": {"layers.1": [1, 2]}})
        said = urlopen(f"http://127.0.0.1:{port}/metrics")
        text = said.read().decode()
        assert said.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert (
            'sluice_step{run="mine"} 2\n' in text
            and 'sluice_main_loss{run="mine"} 2.5\n' in text
            and "load" not in text
        )
        assert "# TYPE sluice_main_loss gauge\n" in text and "# HELP sluice_main_loss cross-entropy" in text
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"http://127.0.0.1:{port}/other")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("", port))  # the port is free again


def test_idle_connections_take_few_threads_and_keep_no_other_out():
    sink, before = PrometheusSink(0, "mine"), threading.active_count()
    sink.write({"step": 3})
    idle = [socket.create_connection(("127.0.0.1", sink.port)) for _ in range(150)]
    try:
        assert b"sluice_step" in urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=60).read()
        ends = time.monotonic() + 60
        while threading.active_count() - before > MOST_CONNECTIONS and time.monotonic() < ends:
            time.sleep(0.05)
        assert threading.active_count() - before <= MOST_CONNECTIONS
    finally:
        for each in idle:
            each.close()
        sink.close()


def test_a_port_that_is_taken_is_an_error_before_the_start():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="is taken by another program"):
            require_port(compose("conf=tiny", f"log.prometheus={port}"))
        with pytest.raises(UserError, match="is taken"):
            PrometheusSink(port, "mine")
        require_port(compose("conf=tiny", f"log.prometheus={port}", "cluster=ray"))  # rank 0 may run elsewhere
    require_port(compose("conf=tiny"))


def test_names_and_values_are_what_prometheus_takes():
    record = {"cluster/goodput": 0.5, "grad_norm": math.inf, "loss": math.nan, "flag": True, "resumed": {"step": 1}}
    lines = [line for line in prometheus_text(record, 'a"b\\c\nd').decode().splitlines() if not line.startswith("#")]
    label = r'{run="a\"b\\c\nd"}'
    assert lines == [f"sluice_cluster_goodput{label} 0.5", f"sluice_grad_norm{label} +Inf", f"sluice_loss{label} NaN"]
