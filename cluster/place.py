"""This process's rank and the number of ranks, from the environment that the driver or torchrun set."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Position of this process among the ranks of its run. By default, it is the only rank."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    """Number of ranks on this machine, which share its cores."""


def given_place() -> Place | None:
    """Return the position that the driver or torchrun assigned; None if it assigned none."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return Place(rank, world, int(os.environ.get("LOCAL_RANK", rank % local_world)), local_world)


def given_attempt() -> int | None:
    """Return the attempt number that a supervisor passed to this rank, or None."""
    return int(os.environ["SLUICE_ATTEMPT"]) if "SLUICE_ATTEMPT" in os.environ else None


@dataclass(frozen=True)
class Meeting:
    """Where the ranks that a driver started find each other: a file, or an address of rank 0 with a secret."""

    file: str | None = None
    address: str = ""
    port: int = 0
    secret: bytes = b""


def given_meeting() -> Meeting | None:
    """Return where the ranks of this run find each other; None for ranks of torchrun, which has its own store.

    Call only once: it removes the secret from the environment.
    """
    if file := os.environ.get("SLUICE_STORE"):
        return Meeting(file)
    if secret := os.environ.pop("SLUICE_STORE_SECRET", None):
        return Meeting(None, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), bytes.fromhex(secret))
    return None


def is_driver() -> bool:
    """Whether this process owns the run folder: it is the driver, or rank 0 if another program started the ranks."""
    place = given_place()
    return place is None or place.rank == 0
