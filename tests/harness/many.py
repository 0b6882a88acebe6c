"""Servers with more instances than calls could make in reasonable time."""

import pathlib
import subprocess

from harness.server import NORMD

# Of one: weight, bias, running_mean and running_var of 64 float32, and num_batches_tracked.
STATE_BYTES = 4 * 64 * 4 + 8


def name_of(number):
    return f"net/layer{number:07}/bn"


def fill_store(directory, count):
    """Stores BatchNorm2d(64) instances, name_of(0) and on, where no server runs yet."""
    program = pathlib.Path(NORMD).resolve().with_name("normd_fill_store")
    subprocess.run([program, directory, str(count)], check=True)
