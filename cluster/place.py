"""This process's place among the ranks of its run, read from the environment that the driver or torchrun set."""

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
    """Return the place that the driver or torchrun gave this process, or None."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return Place(rank, world, int(os.environ.get("LOCAL_RANK", rank % local_world)), local_world)


def given_attempt() -> int | None:
    """Return the attempt number that a supervisor gave this rank, or None."""
    return int(os.environ["SLUICE_ATTEMPT"]) if "SLUICE_ATTEMPT" in os.environ else None


@dataclass(frozen=True)
class Meeting:
    """Meeting point of the ranks that a driver started: a file of this machine, or an address of rank 0 and a
    secret.
    """

    file: str | None = None
    address: str = ""
    port: int = 0
    secret: bytes = b""


def given_meeting() -> Meeting | None:
    """Return the meeting point from the driver; None for ranks of torchrun, which has its own store.

    Call it once: the secret is removed from the environment, because every child of the rank would inherit it.
    """
    if file := os.environ.get("SLUICE_STORE"):
        return Meeting(file)
    if secret := os.environ.pop("SLUICE_STORE_SECRET", None):
        return Meeting(None, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), bytes.fromhex(secret))
    return None


def is_driver() -> bool:
    """Whether this process owns the run folder: the driver, or rank 0 of ranks that were started otherwise."""
    place = given_place()
    return place is None or place.rank == 0
