"""This process's rank and the number of ranks, from the environment."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Position of this process in its run; by default the only rank."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    """Number of ranks on this machine, which share its cores."""


def given_place() -> Place | None:
    """Return the position that the driver or torchrun assigned, or None."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return Place(rank, world, int(os.environ.get("LOCAL_RANK", rank % local_world)), local_world)


def given_attempt() -> int | None:
    """Return the attempt number from this rank's supervisor, or None."""
    return int(os.environ["SLUICE_ATTEMPT"]) if "SLUICE_ATTEMPT" in os.environ else None


@dataclass(frozen=True)
class Meeting:
    """Where a driver's ranks meet: a file, or an address of rank 0 with a secret."""

    file: str | None = None
    address: str = ""
    port: int = 0
    secret: bytes = b""


def given_meeting() -> Meeting | None:
    """Return where the ranks of this run meet; None under torchrun, which has its own store.

    Call only once: it removes the secret from the environment.
    """
    if file := os.environ.get("SLUICE_STORE"):
        return Meeting(file)
    if secret := os.environ.pop("SLUICE_STORE_SECRET", None):
        return Meeting(None, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), bytes.fromhex(secret))
    return None


def is_driver() -> bool:
    """Whether this process owns the run folder: the driver, or rank 0 without a driver."""
    place = given_place()
    return place is None or place.rank == 0
