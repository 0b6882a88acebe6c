"""Adds PyTorch, with cuDNN and without, to the rows that normd_bench_gpu wrote.

peer_ratio is the best peer's time over ours: above 1, ours is faster. Times are by CUDA
events over many calls, so that neither side waits for the other's launches.
"""

import json
import math
import statistics
import sys

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def call_of(name, cudnn):
    """What PyTorch does for the case; None where there is no such thing."""
    parts = name.split("/")
    layer = parts.pop(0) if parts[0].endswith("_norm") else "batch_norm"
    fused = parts[0] == "add_relu"
    if fused:
        parts.pop(0)
    operation, layout, dtype, shape = parts
    shape = [int(part) for part in shape.split("x")]
    dtype = DTYPES[dtype]
    aten = torch.ops.aten

    def tensor():
        value = torch.randn(shape, device="cuda").to(dtype)
        return value.to(memory_format=torch.channels_last) if layout == "nhwc" else value

    x, grad, residual = tensor(), tensor(), tensor()
    channels = shape[1]
    weight = torch.full((channels,), 1.25, device="cuda")
    bias = torch.full((channels,), 0.5, device="cuda")
    if layer == "rms_norm":
        weight = weight.to(dtype)
        if not hasattr(torch.nn.functional, "rms_norm") or operation == "backward" or cudnn:
            return None
        return lambda: torch.nn.functional.rms_norm(x, (channels,), weight, 1e-5)
    if layer == "layer_norm":
        if cudnn:
            return None  # PyTorch has no cuDNN path for it
        weight, bias = weight.to(dtype), bias.to(dtype)
        forward = lambda: aten.native_layer_norm(x, [channels], weight, bias, 1e-5)
        if operation != "backward":
            return forward
        _, mean, rstd = forward()
        return lambda: aten.native_layer_norm_backward(
            grad, x, [channels], mean, rstd, weight, bias, [True, True, True])
    running = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")
    training = operation != "eval"
    finish = (lambda y: torch.relu(y + residual)) if fused else (lambda y: y)
    if operation != "backward":
        return lambda: finish(torch.batch_norm(x, weight, bias, *running, training, 0.1, 1e-5, cudnn))
    leaves = [value.detach().requires_grad_() for value in (x, weight, bias)]
    y = finish(torch.batch_norm(*leaves, *running, True, 0.1, 1e-5, cudnn))
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


def milliseconds(call, rounds=9):
    def run(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    run(3)
    count = max(3, min(2000, int(20 / max(run(3), 1e-3))))
    return statistics.median(run(count) for _ in range(rounds))


def main():
    path = sys.argv[1]
    with open(path) as file:
        rows = json.load(file)
    for row in rows:
        if row["case"].startswith("host/"):
            continue
        for peer, cudnn in (("torch_cudnn", True), ("torch", False)):
            with torch.backends.cudnn.flags(enabled=cudnn):
                call = call_of(row["case"], cudnn)
                if call is not None:
                    row["peers"][peer] = round(milliseconds(call), 5)
        torch.cuda.empty_cache()
        if row["peers"]:
            row["peer_ratio"] = round(min(row["peers"].values()) / row["ours_ms"], 4)
            print(f"{row['case']:52} {row['peer_ratio']:7.2f}  {row['peers']}", flush=True)
        with open(path, "w") as file:
            json.dump(rows, file, indent=1)
    ratios = [row["peer_ratio"] for row in rows if row["peer_ratio"]]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"{len(ratios)} cases beside {torch.__version__}: geometric mean {mean:.2f}, "
              f"least {min(ratios):.2f}")


if __name__ == "__main__":
    main()
