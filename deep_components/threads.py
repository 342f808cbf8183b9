"""How the threads of PyTorch's operators wait for one another."""

import os

# libgomp's threads look so many times whether the next piece of work is there before they sleep: for 0.1 to 0.2 ms. By
# default it is 75 times that, for which a waiting thread may keep a core from the thread that it waits for.
SPINS = 4_000


def short_waits() -> dict[str, str]:
    """The environment variable that makes waits short; none where the user has said how threads wait. It must be set
    before PyTorch is imported. It changes no result."""
    said = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    return {} if said else {"GOMP_SPINCOUNT": str(SPINS)}
