"""How often somebody may ask: a token bucket for each key or address."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

_MOST = 10_000  # buckets; one that is forgotten was not asked for longest


class RateLimit:
    """Token buckets: each fills with `per_minute` tokens a minute, holds `burst`, and a request takes one.

    Used by one thread, that of the event loop.

    Args:
        per_minute: Requests a minute in the long run.
        burst: Requests at once; None takes a tenth of a minute's, and 10 at least.
        clock: Seconds.
    """

    def __init__(
        self, per_minute: float, burst: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._clock = per_minute / 60.0, clock
        self._burst = max(10.0, per_minute / 10) if burst is None else burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when

    def take(self, who: str) -> float | None:
        """Take a token; None, or the seconds until there is one."""
        now = self._clock()
        tokens, since = self._buckets.pop(who, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        allowed = tokens >= 1.0
        self._buckets[who] = (tokens - 1.0 if allowed else tokens, now)
        while len(self._buckets) > _MOST:
            self._buckets.popitem(last=False)
        return None if allowed else (1.0 - tokens) / self._rate
