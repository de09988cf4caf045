"""Which faults a soak meets, and how often: as in 54 days of Llama 3 405B.  [Dubey, arXiv:2407.21783, table 5]

Of its 466 interruptions 47 were planned and 419 were not: 148 GPUs, 72 memories of GPUs, 54 of software, 35 networks,
6 silent corruptions, and the rest of the machine: hosts, cables, disks, power.
"""

import random
from collections.abc import Iterator

# what stands for it here
WEIGHTS = {
    "kill": 148,  # a device fell off: SIGKILL to a rank
    "raise": 72 + 54,  # memory or software: an exception in the middle of a step
    "stop": 35,  # a rank that says nothing any more: SIGSTOP, ended by whoever watches
    "flip": 6,  # a bit of the newest checkpoint differs; then a rank dies, and it would be loaded
    "disk": 466 - 148 - 72 - 54 - 35 - 6 - 47,  # a call to the disk fails
    "preempt": 47,  # planned: SIGTERM to all ranks
}


def faults(rng: random.Random) -> Iterator[str]:
    """Each kind once, in any order, then by weight, for ever."""
    kinds = list(WEIGHTS)
    rng.shuffle(kinds)
    yield from kinds
    while True:
        yield rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
