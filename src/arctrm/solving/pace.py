"""What each kind of work costs, learned as it goes: whether more of it ends before the deadline."""

import time

WARM_SHARE, WARM_SECONDS = 0.5, 1.0
"""Guess of what the very first batch took to warm up: this share of its time, at most so long."""


class Pace:
    """Seconds per unit of each kind of work ("read", "refine", "judge", "plan") in a budget."""

    def __init__(self, budget: float):
        """`budget` in seconds from now on."""
        self.begin = time.monotonic()
        self.end = self.begin + budget
        self._rates: dict[str, float] = {}
        self._warm: set[str] = set()

    def left(self) -> float:
        """Seconds to the end."""
        return max(0.0, self.end - time.monotonic())

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begin

    def knows(self, work: str) -> bool:
        """Whether any of it has been done."""
        return work in self._rates

    def seconds(self, work: str, amount: int) -> float:
        """Seconds that so much of it will take; 0 where nothing is known."""
        return amount * self._rates.get(work, 0.0)

    def record(self, work: str, amount: int, seconds: float, warm: bool = False) -> None:
        """Learn from a batch; the very first one, which pays for warming up, is soon forgotten.

        `warm`: this one did not have to warm up.
        """
        if work not in self._rates and not warm:
            warming = min(seconds * WARM_SHARE, WARM_SECONDS)
            self._rates[work] = (seconds - warming) / max(1, amount)
            return
        now = seconds / max(1, amount)
        self._rates[work] = (self._rates[work] + now) / 2 if work in self._warm else now
        self._warm.add(work)
