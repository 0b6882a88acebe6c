#!/usr/bin/python3
"""The quickstart's pictures and arithmetic: photographs to tensors and back.

Knows nothing of normd: it makes .npy files for normctl to send, judges in float64
what comes back, and draws. Pixels are RGB from 0 to 1; tensors are (N, C, H, W).

  photographs.py batches DIR                        whole.npy, batch-000.npy ...
  photographs.py statistics DIR [STATE BATCHES]     the table's head, a row, ...
  photographs.py learn X Y GRAD_Y                   loss; writes its gradient by Y
  photographs.py gradients X GRAD_Y GRAD_X GRAD_WEIGHT GRAD_BIAS
  photographs.py parameters STATE STEP LOSS         a row of the second table
  photographs.py judge DIR STATE Y                  Y against float64
  photographs.py picture DIR Y OUT.png
"""

import json
import pathlib
import struct
import sys

import numpy
from PIL import Image, ImageDraw

PHOTOS = ("astronaut", "chelsea", "coffee")
BATCHES, CROPS_PER_PHOTO, CROP = 60, 4, 64
EPS = 1e-5

# What the learning asks for: each colour channel with this mean and this deviation
# over all photographs, so that the output is a picture again, without a colour cast.
TARGET_MEAN, TARGET_DEVIATION = 0.5, 0.22


def load_photos():
    folder = pathlib.Path(__file__).parent / "photos"
    pixels = [numpy.asarray(Image.open(folder / f"{name}.jpg").convert("RGB")) for name in PHOTOS]
    return (numpy.stack(pixels).transpose(0, 3, 1, 2) / 255).astype(numpy.float32)


def moments(x):
    """Mean and variance of each channel, in float64."""
    wide = x.astype(numpy.float64)
    return wide.mean(axis=(0, 2, 3)), wide.var(axis=(0, 2, 3))


def by_channel(values):
    return numpy.asarray(values, numpy.float64).reshape(1, -1, 1, 1)


def normalized(x):
    mean, var = moments(x)
    return (x - by_channel(mean)) / numpy.sqrt(by_channel(var) + EPS)


def batches(folder):
    """Random crops, equally many of each photograph. A crop that leaves the picture on
    one side comes in again on the other, so that every pixel is as likely as any other
    and the statistics to find are exactly those of the photographs."""
    photos = load_photos()
    numpy.save(folder / "whole.npy", photos)
    random = numpy.random.default_rng(1)
    height, width = photos.shape[2:]
    for index in range(BATCHES):
        crops = []
        for photo in photos:
            for _ in range(CROPS_PER_PHOTO):
                shift = (-random.integers(height), -random.integers(width))
                crops.append(numpy.roll(photo, shift, axis=(1, 2))[:, :CROP, :CROP])
        numpy.save(folder / f"batch-{index:03d}.npy", numpy.stack(crops))
    print(f"{len(photos)} photographs of {width}x{height}, {BATCHES} batches of shape "
          f"({len(photos) * CROPS_PER_PHOTO}, 3, {CROP}, {CROP}), float32")


def read_safetensors(path):
    """The published format: a length, a JSON header, the data."""
    raw = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    types = {"F32": "<f4", "F64": "<f8", "I64": "<i8"}
    return {
        name: numpy.frombuffer(data[slice(*entry["data_offsets"])], types[entry["dtype"]])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def cells(*groups):
    return "   ".join("  ".join(f"{value:.4f}" for value in group) for group in groups)


def statistics(folder, state=None, batch=None):
    mean, var = moments(numpy.load(folder / "whole.npy"))
    if state is None:
        print("  batches   running_mean             running_var              off the truth by")
        print("            red     green   blue     red     green   blue     at most")
        print(f"   (truth)  {cells(mean, var)}")
        return
    tensors = read_safetensors(state)
    running = tensors["running_mean"], tensors["running_var"]
    if int(tensors["num_batches_tracked"][0]) != int(batch):
        sys.exit(f"num_batches_tracked is {tensors['num_batches_tracked'][0]}, not {batch}")
    off = max(abs(running[0] - mean).max(), abs(running[1] - var).max())
    print(f"  {int(batch):7d}   {cells(*running)}   {off:.4f}")
    if int(batch) == BATCHES and off > 0.02:
        sys.exit("the running statistics did not reach the photographs' own")


def learn(x_path, y_path, grad_path):
    """Half the mean square distance to the photographs as they are asked for, summed
    over the channels, and its gradient."""
    x, y = numpy.load(x_path), numpy.load(y_path)
    wanted = TARGET_MEAN + TARGET_DEVIATION * normalized(x)
    count = x.size // x.shape[1]
    numpy.save(grad_path, ((y - wanted) / count).astype(numpy.float32))
    print(f"{((y - wanted) ** 2).sum() / count / 2:.6f}")


def gradients(x_path, grad_y_path, grad_x_path, grad_weight_path, grad_bias_path):
    """Against Ioffe and Szegedy's formulas (weight is 1 here), in float64."""
    x, grad_y = numpy.load(x_path), numpy.load(grad_y_path).astype(numpy.float64)
    x_hat, count = normalized(x), x.size // x.shape[1]
    invstd = 1 / numpy.sqrt(moments(x)[1] + EPS)
    bias, weight = grad_y.sum(axis=(0, 2, 3)), (grad_y * x_hat).sum(axis=(0, 2, 3))
    flow = grad_y - by_channel(bias) / count - x_hat * by_channel(weight) / count
    exact = (by_channel(invstd) * flow, weight, bias)
    for name, want, path in zip(("grad_input", "grad_weight", "grad_bias"), exact,
                                (grad_x_path, grad_weight_path, grad_bias_path)):
        got = numpy.load(path)
        error = abs(got - want).max() / max(abs(want).max(), abs(grad_y).max())
        print(f"  {name:12s} {str(got.shape):18s} off float64's by {error:.1e} of its size")
        if not error < 1e-4:
            sys.exit(f"{name} is wrong")


def parameters(state, step, loss):
    tensors = read_safetensors(state)
    print(f"  {int(step):4d}   {float(loss):8.5f}   {cells(tensors['weight'], tensors['bias'])}")


def judge(folder, state, y_path):
    """Recomputes the eval answer from the state, and looks whether the photographs came
    out as they were asked for."""
    x, y, tensors = numpy.load(folder / "whole.npy"), numpy.load(y_path), read_safetensors(state)
    scale = tensors["weight"] / numpy.sqrt(tensors["running_var"].astype(numpy.float64) + EPS)
    want = (x - by_channel(tensors["running_mean"])) * by_channel(scale) + by_channel(tensors["bias"])
    error = abs(y - want).max() / abs(want).max()
    mean, var = moments(y)
    print(f"  eval output {y.shape}, off float64's by {error:.1e} of its size")
    print(f"  channel means {cells(mean)} (asked for: {TARGET_MEAN}), "
          f"deviations {cells(numpy.sqrt(var))} (asked for: {TARGET_DEVIATION})")
    if not error < 1e-5:
        sys.exit("the eval output is wrong")
    if abs(mean - TARGET_MEAN).max() > 0.05 or abs(numpy.sqrt(var) - TARGET_DEVIATION).max() > 0.05:
        sys.exit("the layer did not learn what it was asked for")


def picture(folder, y_path, out):
    """Originals above, the server's output below, each value a pixel's."""
    rows = [numpy.load(folder / "whole.npy"), numpy.load(y_path)]
    titles = ["the photographs", "as normd answers: each channel with mean 0.5, deviation 0.22"]
    gap, title_height = 8, 22
    count, _, height, width = rows[0].shape
    sheet = Image.new("RGB", (count * (width + gap) + gap, 2 * (height + title_height) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (title, photos) in enumerate(zip(titles, rows)):
        top = row * (height + title_height)
        draw.text((gap, top + 6), title, fill="black")
        for column, photo in enumerate(photos):
            pixels = (photo.clip(0, 1) * 255).round().astype(numpy.uint8).transpose(1, 2, 0)
            sheet.paste(Image.fromarray(pixels), (gap + column * (width + gap), top + title_height))
    sheet.save(out)


def main(command, *arguments):
    commands = {function.__name__: function for function in
                (batches, statistics, learn, gradients, parameters, judge, picture)}
    if command in ("batches", "statistics", "judge", "picture"):
        arguments = (pathlib.Path(arguments[0]), *arguments[1:])
    commands[command](*arguments)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
