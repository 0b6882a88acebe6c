"""The benchmark `scale`: see run.sh."""

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import statistics
import tempfile
import time

import torch
from harness.layer import EVAL, TRAIN
from harness.many import STATE_BYTES, fill_store, name_of
from harness.server import Server
from harness.tensors import to_proto
from normd.v1 import norm_service_pb2 as rpc

# Checkpoints every minute would be measured too.
FLAGS = ("--checkpoint_interval=1h", "--durability=interval")
SHAPE = (8, 64, 8, 8)
PAGE_SIZE = 1000  # the largest


def resident_bytes(server):
    status = pathlib.Path(f"/proc/{server.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def processor_seconds(server):
    user, system = pathlib.Path(f"/proc/{server.pid}/stat").read_text().split(")")[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def milliseconds(call):
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e6


def forward_milliseconds(servers, mode, rounds):
    """Median of each server, (server, names) by (server, names), in turns so that whatever else
    the machine does befalls both."""
    random.seed(1)
    tensor = to_proto(torch.randn(SHAPE))
    times = [[] for _ in servers]
    for round in range(rounds + 50):
        turns = list(zip(times, servers))
        for taken, (server, count) in turns if round % 2 else turns[::-1]:
            request = rpc.ForwardRequest(name=name_of(random.randrange(count)), input=tensor,
                                         mode=mode)
            took = milliseconds(lambda: server.stub.Forward(request))
            if round >= 50:  # warm
                taken.append(took)
    return [statistics.median(taken) for taken in times]


def page_milliseconds(server, count, pages):
    """Of pages all over the names, by prefix and by token; as bytes, since Python takes longer to
    parse a page than the server to make it."""
    call = server.channel.unary_unary(
        "/normd.v1.NormService/ListInstances",
        request_serializer=rpc.ListInstancesRequest.SerializeToString)
    times = []
    token = ""
    for page in range(pages):
        prefix = name_of(random.randrange(count))[:-6] if page % 2 else ""
        request = rpc.ListInstancesRequest(page_size=PAGE_SIZE, name_prefix=prefix,
                                           page_token="" if prefix else token)
        answers = []
        times.append(milliseconds(lambda: answers.append(call(request))))
        if not prefix:
            token = rpc.ListInstancesResponse.FromString(answers[0]).next_page_token
    return times


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--instances", type=int)
    parser.add_argument("--directory", default=".")
    options = parser.parse_args()
    count = options.instances or (100_000 if options.quick else 1_000_000)
    rounds = 500 if options.quick else 3000

    scratch = tempfile.mkdtemp(prefix="normd-scale-", dir=options.directory)
    many = Server(*FLAGS, f"--max_instances={count}", state_dir=f"{scratch}/many")
    one = Server(*FLAGS, state_dir=f"{scratch}/one")
    try:
        begin = time.perf_counter()
        fill_store(many.state_dir, count)
        print(f"{count} instances stored in {time.perf_counter() - begin:.1f} s", flush=True)
        fill_store(one.state_dir, 1)
        one.start()
        restarts = []
        for _ in range(1 if options.quick else 3):
            if many.alive():
                many.kill()
            restarts.append(milliseconds(lambda: many.start(timeout=600)) / 1e3)
        processor = processor_seconds(many)
        resident = resident_bytes(many)
        pages = page_milliseconds(many, count, 100 if options.quick else 500)
        servers = [(one, 1), (many, count)]
        evals = forward_milliseconds(servers, EVAL, rounds)
        trains = forward_milliseconds(servers, TRAIN, rounds)
        row = {
            "suite": "scale", "case": f"batchnorm2d/c64/n{count}", "instances": count,
            "restart_s": statistics.median(restarts), "restart_cpu_s": processor,
            "resident_bytes": resident, "peak_bytes": many.peak_bytes(),
            "resident_ratio": resident / (count * STATE_BYTES),
            "eval_ms": evals[1], "eval_ratio": evals[1] / evals[0],
            "train_ms": trains[1], "train_ratio": trains[1] / trains[0],
            "page_ms": statistics.median(pages),
            "page_p99_ms": sorted(pages)[len(pages) * 99 // 100], "page_max_ms": max(pages),
        }
        # A shutdown would write a checkpoint, a file an instance.
        many.kill()
    finally:
        for server in (many, one):
            if server.alive():
                server.kill()
            server.close()
        shutil.rmtree(scratch, ignore_errors=True)

    print(f"restart to serving    {row['restart_s']:8.2f} s     of "
          f"{', '.join(f'{restart:.2f}' for restart in restarts)}; {processor:.1f} s of processors")
    print(f"resident              {resident / 1e6:8.0f} MB    {row['resident_ratio']:.2f} times the "
          f"bytes of state; at most {row['peak_bytes'] / 1e6:.0f} MB")
    print(f"forward, eval         {evals[1]:8.3f} ms    {row['eval_ratio']:.3f} times that with one "
          "instance")
    print(f"forward, train        {trains[1]:8.3f} ms    {row['train_ratio']:.3f} times that with "
          "one instance")
    print(f"page of {PAGE_SIZE:5}         {row['page_ms']:8.2f} ms    99 of 100 in "
          f"{row['page_p99_ms']:.2f} ms, all in {row['page_max_ms']:.2f} ms")
    if options.json:
        pathlib.Path(options.json).write_text("[\n" + json.dumps(row) + "\n]\n")


if __name__ == "__main__":
    main()
