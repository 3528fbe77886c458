"""Whether this process itself was held up, as by a busy machine or a laptop that slept: then nobody else is late."""


class HeldUp:
    """Tells how long its process was held up between two looks. nap: seconds that it may be busy between them; now: of the first."""

    def __init__(self, nap: float, now: float):
        self._nap, self._looked = nap, now

    def since_last_look(self, now: float) -> float:
        """Seconds for which nobody may be blamed; 0 where the process was awake."""
        held_up = max(0.0, now - self._looked - self._nap)
        self._looked = now
        return held_up
