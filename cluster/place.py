"""A process among the ranks of its run, as the driver or torchrun has said in the environment."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """This process among the ranks of the run; by default the only one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    """Ranks on this machine; they share its cores."""


def given_place() -> Place | None:
    """The place that torchrun gave this process, or None."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return Place(rank, world, int(os.environ.get("LOCAL_RANK", rank % local_world)), local_world)


def given_attempt() -> int | None:
    """The attempt number that a supervisor gave this rank, or None."""
    return int(os.environ["SLUICE_ATTEMPT"]) if "SLUICE_ATTEMPT" in os.environ else None


@dataclass(frozen=True)
class Meeting:
    """Where the ranks that a driver started meet: a file of this machine, or an address of rank 0 and a secret."""

    file: str | None = None
    address: str = ""
    port: int = 0
    secret: bytes = b""


def given_meeting() -> Meeting | None:
    """What the driver told its ranks; None for those of torchrun, which has a store of its own. Call once: the secret does
    not stay in the environment, which every child of the rank would have.
    """
    if file := os.environ.get("SLUICE_STORE"):
        return Meeting(file)
    if secret := os.environ.pop("SLUICE_STORE_SECRET", None):
        return Meeting(None, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), bytes.fromhex(secret))
    return None


def is_driver() -> bool:
    """Whether this process owns the run folder: the driver, or rank 0 of ranks that others started."""
    place = given_place()
    return place is None or place.rank == 0
