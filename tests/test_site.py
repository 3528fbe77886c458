"""The site of the pages, as `mkdocs build --strict` writes it."""

import json
import os
import subprocess
import sys

import pytest

from conf.schema import ROOT
from tests.docs import pages


@pytest.mark.slow
def test_the_site_has_every_page_with_a_search_and_no_broken_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "search" / "search_index.json").read_text())["docs"]
    places = {one["location"].partition("#")[0] for one in found}
    assert len(places) >= len(pages()) and {"", "plan/", "cluster/ray/", "api/", "results/"} <= places
    assert any(one["location"] == "api/#train.api.run" and "config.mode" in one["text"] for one in found)
    links = "".join(page.read_text() for page in tmp_path.rglob("index.html"))
    assert 'href="https://fonts.' not in links
