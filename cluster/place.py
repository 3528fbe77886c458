"""This process's rank, and the number of ranks. Both are read from the environment that the driver or torchrun set."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The position of this process among the ranks of its run. By default, this process is the only rank."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    """Number of ranks on this machine, which share its cores."""


def given_place() -> Place | None:
    """Return the position that the driver or torchrun assigned to this process; None if it assigned none."""
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
    """Where the ranks that a driver started find each other. It is either a file of this machine, or an address of
    rank 0 with a secret.
    """

    file: str | None = None
    address: str = ""
    port: int = 0
    secret: bytes = b""


def given_meeting() -> Meeting | None:
    """Return where the ranks of this run find each other, as the driver set it; None for ranks of torchrun, which has
    its own store.

    Call this function only once. It removes the secret from the environment, because otherwise every child of the rank
    would inherit the secret.
    """
    if file := os.environ.get("SLUICE_STORE"):
        return Meeting(file)
    if secret := os.environ.pop("SLUICE_STORE_SECRET", None):
        return Meeting(None, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), bytes.fromhex(secret))
    return None


def is_driver() -> bool:
    """Whether this process owns the run folder. The owner is the driver, or rank 0 if another program started the
    ranks.
    """
    place = given_place()
    return place is None or place.rank == 0
