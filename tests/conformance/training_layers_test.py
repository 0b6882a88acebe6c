"""The digits network of training_run_test with each layer in the batch norms' place, and
with a residual block whose norm, addition and ReLU are one call.

Twins with the same start and the same batches: one of torch's modules, one whose norms
live on the server. Their losses never differ, and they end equally good.
"""

import unittest

import torch
from harness.layer import Layer
from harness.server import ServerTestCase
from harness.torch_layer import RMSNorm, ServedNorm
from normd.v1 import instance_pb2, norm_service_pb2 as rpc, optimizer_pb2, tensor_pb2
from sklearn.datasets import load_digits

STEPS = 100
LR, MOMENTUM = 0.05, 0.9
# In float32 a ReLU whose input rounds to the other side of 0 parts the twins sooner or later,
# whichever is nearer to float64 (torch's own losses leave float64's by 1e-3 within 100 steps).
# So float64 is compared to the end, float32 before that.
TOLERANCE = {torch.float32: (1e-4, 15), torch.float64: (1e-9, STEPS)}
START, ORDER, BATCHES = 7, 1, 2
print(f"fixed seeds: start {START}, order {ORDER}, batches {BATCHES}", flush=True)

# The shapes (C, H, W) of what the norms see.
SHAPES = [(8, 8, 8), (16, 4, 4)]

# The layer of a shape: torch's module, and the config of its twin.
LAYERS = {
    "LayerNorm": lambda shape: (
        torch.nn.LayerNorm(shape),
        dict(layer_norm=instance_pb2.LayerNorm(normalized_shape=shape))),
    "GroupNorm": lambda shape: (
        torch.nn.GroupNorm(4, shape[0]),
        dict(group_norm=instance_pb2.GroupNorm(num_groups=4, num_channels=shape[0]))),
    "InstanceNorm2d": lambda shape: (
        torch.nn.InstanceNorm2d(shape[0], affine=True, track_running_stats=True),
        dict(instance_norm_2d=instance_pb2.InstanceNorm2d(
            num_features=shape[0], affine=True, track_running_stats=True))),
    "RMSNorm": lambda shape: (
        RMSNorm(shape, eps=1e-5),
        dict(rms_norm=instance_pb2.RmsNorm(normalized_shape=shape, eps=1e-5))),
    "BatchNorm2d": lambda shape: (
        torch.nn.BatchNorm2d(shape[0]),
        dict(batch_norm_2d=instance_pb2.BatchNorm2d(num_features=shape[0]))),
}


def plain_network(norm):
    """Conv -> norm -> ReLU twice, then a linear layer; norm(shape) makes the norm."""
    torch.manual_seed(START)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1, bias=False), norm(SHAPES[0]), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), norm(SHAPES[1]),
        torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(16 * 4 * 4, 10))


class LocalBlockEnd(torch.nn.Module):
    """What the fused call does, one after another."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, residual):
        return torch.relu(self.norm(x) + residual)


class ResidualNetwork(torch.nn.Module):
    """Two residual blocks; block_end(shape) makes a module of relu(norm(x) + residual)."""

    def __init__(self, block_end):
        super().__init__()
        torch.manual_seed(START)
        self.stem = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.convs = torch.nn.ModuleList([
            torch.nn.Conv2d(8, 8, 3, padding=1, bias=False),
            torch.nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)])
        self.shortcuts = torch.nn.ModuleList([
            torch.nn.Identity(), torch.nn.Conv2d(8, 16, 1, stride=2)])
        self.ends = torch.nn.ModuleList([block_end(shape) for shape in SHAPES])
        self.linear = torch.nn.Linear(16 * 4 * 4, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for conv, shortcut, end in zip(self.convs, self.shortcuts, self.ends):
            x = end(conv(x), shortcut(x))
        return self.linear(x.flatten(1))


class TrainingRuns(ServerTestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        torch.set_num_threads(1)
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float64).unsqueeze(1) / 16
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(ORDER))
        train, test = order[:1400], order[1400:]
        cls.train, cls.test = (images[train], labels[train]), (images[test], labels[test])

    dtype = torch.float32

    def accuracy(self, net):
        net.eval()
        with torch.no_grad():
            return (net(self.test[0].to(self.dtype)).argmax(1) == self.test[1]).double().mean().item()

    def served(self, run, kind, shape, **arguments):
        name = f"{run}/{shape[0]}"
        _, config = LAYERS[kind](shape)
        self.stub.CreateInstance(rpc.CreateInstanceRequest(
            name=name, config=instance_pb2.InstanceConfig(
                state_dtype=(tensor_pb2.DATA_TYPE_FLOAT64 if self.dtype == torch.float64
                             else tensor_pb2.DATA_TYPE_FLOAT32), **config)))
        return ServedNorm(Layer(self.stub, name), **arguments)

    def run_twins(self, what, local, served):
        local, served = local.to(self.dtype), served.to(self.dtype)
        sgd = optimizer_pb2.Optimizer(sgd=optimizer_pb2.Sgd(lr=LR, momentum=MOMENTUM))
        norms = [module.layer for module in served.modules() if isinstance(module, ServedNorm)]
        self.assertEqual(len(norms), len(SHAPES))
        optimizers = [torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
                      for net in (local, served)]
        loss_of = torch.nn.CrossEntropyLoss()
        picks = torch.Generator().manual_seed(BATCHES)
        tolerance, compared = TOLERANCE[self.dtype]
        losses = []
        for step in range(STEPS):
            batch = torch.randint(len(self.train[1]), (64,), generator=picks)
            pair = []
            for net, optimizer in zip((local, served), optimizers):
                net.train()
                optimizer.zero_grad()
                loss = loss_of(net(self.train[0][batch].to(self.dtype)), self.train[1][batch])
                loss.backward()
                optimizer.step()
                pair.append(loss.item())
            for norm in norms:
                self.assertTrue(norm.step(sgd, zero_grad=True).stepped)
            losses.append(pair)
            if step < compared:
                self.assertLessEqual(abs(pair[0] - pair[1]), tolerance * abs(pair[0]),
                                     f"{what}: loss at step {step}: {pair}")
        self.assertLess(losses[-1][0], losses[0][0] / 3, f"{what}: the network did not learn")
        due, got = self.accuracy(local), self.accuracy(served)
        worst = max(abs(a - b) / abs(a) for a, b in losses[:compared])
        print(f"{what}: loss {losses[0][0]:.3f} -> {losses[-1][0]:.3f}, largest relative "
              f"difference {worst:.1e}, test accuracy {due:.4f} and {got:.4f}", flush=True)
        self.assertGreater(due, 0.85)
        self.assertLessEqual(abs(got - due), 0 if self.dtype == torch.float64 else 0.03)
        for norm in norms:
            weight = norm.state_dict()["weight"]
            self.assertGreater((weight - 1).abs().max().item(), 1e-2, "the weight did not move")

    def run_plain(self, kind):
        for self.dtype in (torch.float32, torch.float64):
            run = f"{kind}-{str(self.dtype).split('.')[1]}"
            self.run_twins(run, plain_network(lambda shape: LAYERS[kind](shape)[0]),
                           plain_network(lambda shape: self.served(run, kind, shape)))

    def run_fused(self, kind, dtype):
        run = f"fused-{kind}-{str(dtype).split('.')[1]}"
        self.dtype = dtype
        self.run_twins(
            run, ResidualNetwork(lambda shape: LocalBlockEnd(LAYERS[kind](shape)[0])),
            ResidualNetwork(lambda shape: self.served(run, kind, shape,
                                                      activation=rpc.ACTIVATION_RELU)))

    def test_layer_norm_follows_pytorch(self):
        self.run_plain("LayerNorm")

    def test_group_norm_follows_pytorch(self):
        self.run_plain("GroupNorm")

    def test_instance_norm_2d_follows_pytorch(self):
        self.run_plain("InstanceNorm2d")

    def test_rms_norm_follows_the_formula(self):
        self.run_plain("RMSNorm")

    def test_batch_norm_residual_and_relu_in_one_call_follow_pytorch(self):
        for dtype in (torch.float32, torch.float64):
            self.run_fused("BatchNorm2d", dtype)

    def test_group_norm_residual_and_relu_in_one_call_follow_pytorch(self):
        for dtype in (torch.float32, torch.float64):
            self.run_fused("GroupNorm", dtype)


if __name__ == "__main__":
    unittest.main()
