"""The seed of randomized tests: printed, and repeated with NORMD_SEED=N."""

import os
import random

import torch

SEED = int(os.environ.get("NORMD_SEED") or random.SystemRandom().randrange(10**9))
print(f"NORMD_SEED={SEED} repeats this run", flush=True)

# The server has the cores; the judge is patient.
torch.set_num_threads(1)


def generator(case):
    """A source of random numbers for one case, alike whichever other cases run."""
    return random.Random(f"{SEED}/{case}")


def torch_generator(rng):
    return torch.Generator().manual_seed(rng.randrange(2**63))
