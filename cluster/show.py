"""Show where the ranks of a recipe would run, and start nothing:  python -m cluster.show NODESxDEVICES[/RACK]
OVERRIDES...

RACK is the number of nodes in a rack. For example, 256 nodes of 8 devices, with 32 nodes in a rack:

    python -m cluster.show 256x8/32 conf=deepseek_v3 data=stdlib
"""

import re
import sys

from cluster.topology import Node, placement_table, require
from conf.errors import EXIT_OK, UserError
from conf.load import compose, reported
from conf.words import say


def nodes_of(text: str) -> list[Node]:
    """Return the nodes of a hypothetical cluster. Raises UserError unless the text is NODESxDEVICES[/RACK]."""
    match = re.fullmatch(r"(\d+)x(\d+)(?:/(\d+))?", text)
    if match is None:
        raise UserError("nodes", text, "must be NODESxDEVICES or NODESxDEVICES/NODES_PER_RACK", "for example 256x8/32")
    count, devices, rack = int(match[1]), int(match[2]), int(match[3] or 0)
    return [
        Node(f"{i}", f"n{i}", f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", devices, f"r{i // rack}" if rack else "")
        for i in range(count)
    ]


@reported
def main(arguments: list[str]) -> int:
    if not arguments:
        say(__doc__)
        return EXIT_OK
    parallel = compose(*arguments[1:]).parallel
    say(placement_table(require(nodes_of(arguments[0]), parallel.pp, parallel.stage_ranks, parallel.ep)))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
