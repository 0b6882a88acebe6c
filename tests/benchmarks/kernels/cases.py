"""The problems that are timed, as named lists."""

import collections
import dataclasses
import math

DType = collections.namedtuple("DType", "code bytes torch")
DTYPES = {
    "f32": DType(0, 4, "float32"),
    "f64": DType(1, 8, "float64"),
    "f16": DType(2, 2, "float16"),
    "bf16": DType(3, 2, "bfloat16"),
}
OPERATIONS = ["eval", "train_forward", "backward"]
LAYERS = ["batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"]

# ResNet-50's layers at batch 32, and shapes that are awkward each in its own way.
BATCH_NORM = [
    (32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14),
    (32, 2048, 7, 7), (1, 64, 56, 56), (8, 16, 32, 32), (64, 3, 224, 224), (256, 512, 1, 1)]
BATCH_NORM_1D = [(65536, 256, 1, 1)]
ROWS = [(8192, 768), (4096, 4096), (64, 16384)]
GROUP_NORM = [((32, 256, 56, 56), 32), ((8, 64, 128, 128), 8)]
INSTANCE_NORM = [(8, 64, 256, 256)]
FUSED = [(32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7)]
QUICK = [(32, 512, 28, 28), (32, 2048, 7, 7), (8, 16, 32, 32)]


@dataclasses.dataclass
class Case:
    operation: str
    layout: str
    dtype: str
    shape: tuple
    layer: str = "batch_norm"
    groups: int = 1
    fused: bool = False

    batch = property(lambda self: self.shape[0])
    channels = property(lambda self: self.shape[1])
    height = property(lambda self: self.shape[2] if len(self.shape) == 4 else 1)
    width = property(lambda self: self.shape[3] if len(self.shape) == 4 else 1)

    def count(self):
        return self.batch * self.channels * self.height * self.width

    def torch_shape(self):
        return self.shape

    def name(self):
        layer = "" if self.layer == "batch_norm" else f"{self.layer}/"
        fused = "add_relu/" if self.fused else ""
        return (f"{layer}{fused}{self.operation}/{self.layout}/{self.dtype}/"
                f"{'x'.join(map(str, self.shape))}")

    def traffic(self):
        """Tensors read before, read and written: what the floor does."""
        backward = self.operation == "backward"
        inputs = 2 if backward or self.fused else 1
        outputs = 2 if backward and self.fused else 1
        reads = 0
        if self.layer == "batch_norm" and self.layout == "nhwc":
            reads = {"eval": 0, "train_forward": 1, "backward": 2}[self.operation]
        return reads, inputs, outputs

    def bytes_moved(self):
        return sum(self.traffic()) * self.count() * DTYPES[self.dtype].bytes


def family():
    """The siblings of BatchNorm2d."""
    for dtype in ("f32", "bf16"):
        for operation in ("train_forward", "backward"):
            for layer in ("layer_norm", "rms_norm"):
                for shape in ROWS:
                    yield Case(operation, "nchw", dtype, shape, layer)
            for shape, groups in GROUP_NORM:
                yield Case(operation, "nchw", dtype, shape, "group_norm", groups)
            for shape in INSTANCE_NORM:
                yield Case(operation, "nchw", dtype, shape, "instance_norm", shape[1])
            for shape in BATCH_NORM_1D:
                yield Case(operation, "nhwc", dtype, shape)
            for shape in FUSED:
                for layout in ("nchw", "nhwc"):
                    yield Case(operation, layout, dtype, shape, fused=True)


def past_cache(counts, cache_bytes):
    """BatchNorm's large shapes, of so many images that not even halves fit the cache."""
    for shape in BATCH_NORM:
        image = math.prod(shape[1:]) * DTYPES["bf16"].bytes
        if image * shape[0] < 1 << 22:
            continue
        batch = -(-cache_bytes // image // 32) * 32
        for operation in OPERATIONS:
            for layout in ("nchw", "nhwc"):
                for dtype in ("f32", "bf16", "f16"):
                    for count in counts:
                        yield Case(operation, layout, dtype, (batch, *shape[1:])), count


def select(quick, threads):
    """Yields (case, threads)."""
    counts = [int(part) for part in threads.split(",")] if threads else None
    if quick:
        for count in counts or (1,):
            for operation in OPERATIONS:
                for layout in ("nchw", "nhwc"):
                    for shape in QUICK:
                        yield Case(operation, layout, "f32", shape), count
                yield Case(operation, "nchw", "bf16", QUICK[0]), count
            yield Case("train_forward", "nchw", "f32", ROWS[0], "layer_norm"), count
            yield Case("backward", "nchw", "f32", ROWS[0], "layer_norm"), count
            yield Case("train_forward", "nchw", "f32", FUSED[1], fused=True), count
        return
    for count in counts or (1, 2):
        for dtype in ("f32", "bf16", "f16"):
            for operation in OPERATIONS:
                for layout in ("nchw", "nhwc"):
                    for shape in BATCH_NORM:
                        yield Case(operation, layout, dtype, shape), count
        for case in family():
            yield case, count
