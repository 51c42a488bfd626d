"""How long something takes, on a machine that others use too."""

import time
from collections.abc import Callable


def fastest(call: Callable[[], object], tries: int = 5) -> float:
    """Seconds of the processor, the least of several tries: what else runs does not count, nor a pause to collect garbage."""
    seconds = []
    for _ in range(tries):
        begin = time.process_time()
        call()
        seconds.append(time.process_time() - begin)
    return min(seconds)
