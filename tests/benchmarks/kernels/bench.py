"""Times the kernels beside oneDNN, PyTorch and the machine's own limit.

All contenders of a case run in one process, in interleaved rounds and random order;
what is reported are medians, and ratios of the same round, so that a busy machine
slows all of them alike. On one thread the time is the thread's own processor time,
so that what else runs on the machine counts less; on several it is the clock's.

  floor_ratio  floor's time / ours: 1 is the limit. The floor reads and writes the
               bytes that the case must move, and computes nothing:
                 eval           x -> y
                 train_forward  nchw: x -> y; nhwc: x read once more before
                 backward       nchw: x, dy -> dx; nhwc: both read once more before
               and, fused, the residual with them. Best of ordinary and non-temporal
               stores, on as many threads.
  bound_ratio  bound's time / ours: each set is read and summed, then read again, scaled
               and written, in our order and with our fetching ahead (eval: the second
               alone). Computed is the least that there is to it, in float32, as if memory
               were one long vector of the same set: widen, add to a sum and a sum of
               squares or products; widen, multiply and add, round.
  peer_ratio   best peer's time / ours: above 1, ours is faster. In nchw oneDNN may
               use its own private layout (onednn_blocked).

--past-cache times ours alone on batches so large that not even a tensor of halves fits
the last-level cache, and shows how many times as fast as float32 halves are.
"""

import argparse
import ctypes
import json
import math
import pathlib
import random
import statistics
import sys
import time

import cases as case_lists
from cases import DTYPES, LAYERS, OPERATIONS


class BenchCase(ctypes.Structure):
    """As in contender.h."""

    _fields_ = [(name, ctypes.c_int32) for name in (
        "operation", "layer", "dtype", "channels_last", "fused", "threads")] + [
            (name, ctypes.c_int64) for name in (
                "batch", "channels", "height", "width", "groups")] + [
                    (name, ctypes.c_void_p) for name in ("x", "y", "grad_y", "residual")]


def load_library(path):
    library = ctypes.CDLL(path)
    pointer = ctypes.c_void_p
    library.bench_ours.restype = pointer
    library.bench_floor.restype = pointer
    library.bench_bound.restype = pointer
    library.bench_free.argtypes = [pointer]
    library.bench_run.argtypes = [pointer, ctypes.c_int64, ctypes.c_int32]
    library.bench_run.restype = ctypes.c_double
    library.bench_allocate.argtypes = [ctypes.c_int64]
    library.bench_allocate.restype = pointer
    library.bench_deallocate.argtypes = [pointer, ctypes.c_int64]
    library.bench_fill.argtypes = [
        pointer, ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_uint32]
    library.bench_instruction_set.restype = ctypes.c_char_p
    if hasattr(library, "bench_onednn"):
        library.bench_onednn.restype = pointer
    return library


class Tensors:
    """Memory that all contenders of a case share, kept from case to case."""

    def __init__(self, library):
        self.library = library
        self.memory = {}

    def get(self, name, dtype, count):
        size = count * DTYPES[dtype].bytes
        if self.memory.get(name, (None, 0))[1] < size:
            if name in self.memory:
                self.library.bench_deallocate(*self.memory[name])
            self.memory[name] = (self.library.bench_allocate(size), size)
        address = self.memory[name][0]
        self.library.bench_fill(address, DTYPES[dtype].code, count, 0.25, len(name))
        return address


class Native:
    def __init__(self, library, handle, threads):
        self.library, self.handle, self.threads = library, handle, threads

    def run(self, count):
        return self.library.bench_run(self.handle, count, self.threads == 1)

    def close(self):
        self.library.bench_free(self.handle)


class Torch:
    """PyTorch as its users call it, or (keep) with malloc told to reuse memory."""

    def __init__(self, torch, library, case, threads, keep):
        self.torch, self.library, self.threads, self.keep = torch, library, threads, keep
        dtype = getattr(torch, DTYPES[case.dtype].torch)
        shape = case.torch_shape()
        channels = case.channels

        def tensor():
            value = torch.randn(shape).to(dtype)
            if case.layout == "nhwc":
                value = value.to(memory_format=torch.channels_last)
            return value

        x, grad, residual = tensor(), tensor(), tensor() if case.fused else None
        weight, bias = torch.full((channels,), 1.25), torch.full((channels,), 0.5)
        mean, var = torch.zeros(channels), torch.ones(channels)
        training = case.operation != "eval"
        aten = torch.ops.aten
        finish = (lambda y: torch.relu(y + residual)) if case.fused else (lambda y: y)
        if case.layer in ("layer_norm", "rms_norm"):
            weight, bias = weight.to(dtype), bias.to(dtype)
            forward = lambda: aten.native_layer_norm(x, [channels], weight, bias, 1e-5)
            if case.operation == "backward":
                _, save_mean, save_rstd = forward()
                self.call = lambda: aten.native_layer_norm_backward(
                    grad, x, [channels], save_mean, save_rstd, weight, bias, [True, True, True])
            else:
                self.call = forward
        elif case.layer == "batch_norm":
            forward = lambda: finish(
                torch.batch_norm(x, weight, bias, mean, var, training, 0.1, 1e-5, False))
            if case.operation == "backward":
                _, save_mean, save_invstd = aten.native_batch_norm(
                    x, weight, bias, mean, var, True, 0.1, 1e-5)
                y = forward() if case.fused else None

                def backward():
                    g = grad
                    if case.fused:
                        g = aten.threshold_backward(grad, y, 0)
                    return aten.native_batch_norm_backward(
                        g, x, weight, mean, var, save_mean, save_invstd, True, 1e-5,
                        [True, True, True])

                self.call = backward
            else:
                self.call = forward
        else:
            weight, bias = weight.to(dtype), bias.to(dtype)
            groups = case.groups
            if case.operation == "backward":
                leaf = x.detach().requires_grad_()
                weight.requires_grad_()
                bias.requires_grad_()
                y = (torch.group_norm(leaf, groups, weight, bias, 1e-5, False)
                     if case.layer == "group_norm" else
                     torch.instance_norm(leaf, weight, bias, None, None, True, 0.1, 1e-5, False))
                self.call = lambda: torch.autograd.grad(
                    y, (leaf, weight, bias), grad, retain_graph=True)
            elif case.layer == "group_norm":
                self.call = lambda: torch.group_norm(x, groups, weight, bias, 1e-5, False)
            else:
                self.call = lambda: torch.instance_norm(
                    x, weight, bias, None, None, True, 0.1, 1e-5, False)
        self.run(1)

    def run(self, count):
        self.torch.set_num_threads(self.threads)
        self.library.bench_keep_memory(1 if self.keep else 0)
        call = self.call
        clock = time.thread_time if self.threads == 1 else time.perf_counter
        begin = clock()
        for _ in range(count):
            call()
        elapsed = clock() - begin
        self.library.bench_keep_memory(0)
        return elapsed

    def close(self):
        self.call = None


class Unfused:
    """Ours, one after another: the norm, and a pass that adds and cuts."""

    def __init__(self, norm, add):
        self.parts = [norm, add]

    def run(self, count):
        return sum(part.run(count) for part in self.parts)

    def close(self):
        for part in self.parts:
            part.close()


def contenders(library, torch, tensors, case, threads, alone):
    count = case.count()
    bench = BenchCase(
        operation=OPERATIONS.index(case.operation), layer=LAYERS.index(case.layer),
        dtype=DTYPES[case.dtype].code, channels_last=case.layout == "nhwc", fused=case.fused,
        threads=threads, batch=case.batch, channels=case.channels, height=case.height,
        width=case.width, groups=case.groups, x=tensors.get("x", case.dtype, count),
        y=tensors.get("y", case.dtype, count), grad_y=None, residual=None)
    if case.operation == "backward":
        bench.grad_y = tensors.get("grad_y", case.dtype, count)
    if case.fused:
        bench.residual = tensors.get("residual", case.dtype, count)
    reference = ctypes.byref(bench)
    native = lambda handle: Native(library, handle, threads)

    found = {"ours": native(library.bench_ours(reference))}
    reads, inputs, outputs = case.traffic()
    for stream in (0, 1):
        found[f"floor{stream}"] = native(
            library.bench_floor(reference, reads, inputs, outputs, stream))
        found[f"bound{stream}"] = native(library.bench_bound(reference, inputs, outputs, stream))
    if hasattr(library, "bench_onednn") and not alone:
        for blocked, name in ((0, "onednn"), (1, "onednn_blocked")):
            if blocked and case.layout != "nchw":
                continue
            handle = library.bench_onednn(reference, blocked)
            if handle:
                found[name] = native(handle)
    if case.fused:
        plain = BenchCase.from_buffer_copy(bench)
        plain.fused = 0
        pass_ = BenchCase.from_buffer_copy(bench)
        pass_.operation = 0
        found["ours_unfused"] = Unfused(
            native(library.bench_ours(ctypes.byref(plain))),
            native(library.bench_floor(ctypes.byref(pass_), 0, 2, 1, 1)))
    if torch is not None and case.layer != "rms_norm":
        for keep, name in ((True, "torch"), (False, "torch_as_called")):
            try:
                found[name] = Torch(torch, library, case, threads, keep)
            except RuntimeError:  # not implemented for this type
                break
    return found


OMP_PAUSE_SOFT = 1  # of omp.h


def measure(found, rounds, seconds):
    """Seconds a call, a list of rounds each."""
    openmp = ctypes.CDLL("libgomp.so.1")
    counts = {}
    for name, contender in found.items():
        once = contender.run(1)
        once = min(once, contender.run(1))
        counts[name] = max(1, min(10000, int(seconds / max(once, 1e-7))))
    times = {name: [] for name in found}
    order = list(found)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            # Other runtimes' threads spin for a while after their work, OpenMP's for so long
            # that they would take half of the next one's processors: they are ended.
            openmp.omp_pause_resource_all(OMP_PAUSE_SOFT)
            time.sleep(0.002)
            found[name].run(1)
            times[name].append(found[name].run(counts[name]) / counts[name])
    return times


def summarize(case, threads, times):
    rounds = len(times["ours"])
    better = lambda name: times[min(
        (f"{name}0", f"{name}1"), key=lambda which: statistics.median(times[which]))]
    floor = better("floor")
    peers = {name: times[name] for name in times
             if not name.startswith(("ours", "floor", "bound"))}
    ours = times["ours"]
    paired = lambda other: statistics.median(o / u for o, u in zip(other, ours))
    milliseconds = lambda values: round(statistics.median(values) * 1e3, 4)
    quartiles = statistics.quantiles(ours, n=4) if rounds > 1 else [ours[0]] * 3
    row = {
        "suite": "kernels",
        "case": f"{case.name()}/t{threads}",
        "ours_ms": milliseconds(ours),
        "ours_min_ms": round(min(ours) * 1e3, 4),
        "ours_quartiles_ms": [round(quartiles[0] * 1e3, 4), round(quartiles[2] * 1e3, 4)],
        "floor_ms": milliseconds(floor),
        "peers": {name: milliseconds(values) for name, values in peers.items()},
        "floor_ratio": round(paired(floor), 3),
        "peer_ratio": round(min(map(paired, peers.values())), 3) if peers else None,
        "bytes": case.bytes_moved(),
    }
    same = [values for name, values in peers.items() if name != "onednn_blocked"]
    row["same_layout_peer_ratio"] = round(min(map(paired, same)), 3) if same else None
    if "bound0" in times:
        row["bound_ms"] = milliseconds(better("bound"))
        row["bound_ratio"] = round(paired(better("bound")), 3)
    if "ours_unfused" in times:
        row["unfused_ratio"] = round(paired(times["ours_unfused"]), 3)
    return row


def last_level_cache_bytes():
    sizes = {int(index.read_text()): (index.parent / "size").read_text().strip()
             for index in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/level")}
    return int(sizes[max(sizes)].removesuffix("K")) << 10


def print_halves(rows):
    times = {row["case"]: row["ours_ms"] for row in rows}
    for dtype in ("bf16", "f16"):
        ratios = {name: times[name.replace(f"/{dtype}/", "/f32/")] / time
                  for name, time in times.items() if f"/{dtype}/" in name}
        for name, ratio in ratios.items():
            print(f"{name:58} {ratio:.2f} times as fast as float32")
        print(f"{dtype}: {geometric_mean(ratios.values()):.2f} times by geometric mean")


def geometric_mean(values):
    values = [value for value in values if value]
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def print_header():
    print(f"{'case':58} {'ours':>9} {'floor':>9} {'f.ratio':>8} {'b.ratio':>8} {'p.ratio':>8}  peers (ms)")


def print_row(row):
    peers = "  ".join(f"{name} {value:.3f}" for name, value in row["peers"].items())
    ratio = lambda name: f"{row[name]:.2f}" if row.get(name) is not None else "-"
    print(f"{row['case']:58} {row['ours_ms']:9.3f} {row['floor_ms']:9.3f} "
          f"{row['floor_ratio']:8.2f} {ratio('bound_ratio'):>8} {ratio('peer_ratio'):>8}  {peers}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--quick", action="store_true", help="a telling tenth, under a minute")
    parser.add_argument("--past-cache", action="store_true", help="see above")
    parser.add_argument("--json", help="write the rows there")
    parser.add_argument("--plot", help="draw the bandwidths there, as PNG")
    parser.add_argument("--filter", default="", help="only cases whose name has this in it;"
                        " several, comma-separated: all of them")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--threads", default="", help="comma-separated; default 1,2")
    parser.add_argument("--no-torch", action="store_true")
    arguments = parser.parse_args()

    torch = None
    if not arguments.no_torch and not arguments.past_cache:
        try:
            import torch
        except ImportError:
            print("no PyTorch here: without that peer", file=sys.stderr)
    library = load_library(arguments.library)
    print(f"instruction set {library.bench_instruction_set().decode()}", file=sys.stderr)
    tensors = Tensors(library)
    rounds = arguments.rounds or (5 if arguments.quick else 9)
    seconds = 0.008 if arguments.quick else 0.02
    rows = []
    print_header()
    if arguments.past_cache:
        counts = [int(part) for part in (arguments.threads or "1").split(",")]
        cases = case_lists.past_cache(counts, last_level_cache_bytes())
    else:
        cases = case_lists.select(arguments.quick, arguments.threads)
    for case, threads in cases:
        if not all(part in f"{case.name()}/t{threads}" for part in arguments.filter.split(",")):
            continue
        found = contenders(library, torch, tensors, case, threads, arguments.past_cache)
        try:
            row = summarize(case, threads, measure(found, rounds, seconds))
        finally:
            for contender in found.values():
                contender.close()
        rows.append(row)
        print_row(row)
        if arguments.json:  # also when interrupted
            with open(arguments.json, "w") as file:
                json.dump(rows, file, indent=1)
    if not rows:
        sys.exit("no such case")
    print(f"{len(rows)} cases; geometric means: floor ratio "
          f"{geometric_mean(row['floor_ratio'] for row in rows):.2f}, same layout's best peer "
          f"{geometric_mean(row['same_layout_peer_ratio'] for row in rows):.2f}, any peer "
          f"{geometric_mean(row['peer_ratio'] for row in rows):.2f}")
    if arguments.past_cache:
        print_halves(rows)
    if arguments.plot:
        import plot
        plot.draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
