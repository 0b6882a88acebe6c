"""A real training run: handwritten digits, with the network's batch norms on normd.

Twins with the same start and the same batches: one with torch.nn.BatchNorm2d and
torch.optim.SGD, one whose batch norms live on the server: their forward,
backward, gradients and SGD steps. After 100 steps their losses have never
differed, and they are equally good; so is the network that a checkpoint and a
new server bring back.
"""

import unittest

import torch
from harness.server import Server
from harness.torch_layer import ServedBatchNorm2d
from normd.v1 import norm_service_pb2 as rpc, optimizer_pb2
from sklearn.datasets import load_digits

STEPS = 100
LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 1e-4
SGD = optimizer_pb2.Optimizer(
    sgd=optimizer_pb2.Sgd(lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY))


def network(batch_norm, dtype):
    """Conv -> BN -> ReLU twice, then a linear layer; batch_norm(index, channels) makes BN."""
    torch.manual_seed(7)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1, bias=False), batch_norm(0, 8), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), batch_norm(1, 16),
        torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(16 * 4 * 4, 10)).to(dtype)


class TrainingRun(unittest.TestCase):
    def setUp(self):
        torch.set_num_threads(1)
        self.server = Server().start()
        self.addCleanup(self.server.close)

    def digits(self, dtype):
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=dtype).unsqueeze(1) / 16
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
        train, test = order[:1400], order[1400:]
        return (images[train], labels[train]), (images[test], labels[test])

    def accuracy(self, net, examples):
        net.eval()
        with torch.no_grad():
            right = net(examples[0]).argmax(1) == examples[1]
        return right.double().mean().item()

    def run_twins(self, dtype, tolerance):
        train, test = self.digits(dtype)
        local = network(lambda _, c: torch.nn.BatchNorm2d(c), dtype)
        served = network(lambda i, c: ServedBatchNorm2d(self.server.stub, f"digits/bn{i}", c,
                                                        dtype=dtype), dtype)
        norms = [module.layer for module in served if isinstance(module, ServedBatchNorm2d)]
        optimizers = [torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM,
                                      weight_decay=WEIGHT_DECAY) for net in (local, served)]
        loss_of = torch.nn.CrossEntropyLoss()
        picks = torch.Generator().manual_seed(2)
        losses = []
        for step in range(STEPS):
            batch = torch.randint(len(train[1]), (64,), generator=picks)
            pair = []
            for net, optimizer in zip((local, served), optimizers):
                net.train()
                optimizer.zero_grad()
                loss = loss_of(net(train[0][batch]), train[1][batch])
                loss.backward()
                optimizer.step()
                pair.append(loss.item())
            for norm in norms:
                self.assertTrue(norm.step(SGD, zero_grad=True).stepped)
            losses.append(pair)
            self.assertLessEqual(abs(pair[0] - pair[1]), tolerance * abs(pair[0]),
                                 f"loss at step {step}: {pair}")
        self.assertLess(losses[-1][0], losses[0][0] / 4, "the network did not learn")

        due = self.accuracy(local, test)
        self.assertGreater(due, 0.9)
        self.assertEqual(self.accuracy(served, test), due)
        for norm in norms:
            self.assertEqual(norm.info().num_batches_tracked, STEPS)
        worst = max(abs(a - b) / abs(a) for a, b in losses)
        print(f"{dtype}: loss {losses[0][0]:.3f} -> {losses[-1][0]:.3f}, largest relative "
              f"difference {worst:.1e}, test accuracy {due:.4f} twice", flush=True)

        # The server goes; a checkpoint and a new one bring the network back.
        self.server.stub.SaveCheckpoint(rpc.SaveCheckpointRequest())
        self.server.restart()
        for norm in norms:
            norm.stub = self.server.stub
        self.assertEqual(self.accuracy(served, test), due)

    def test_float32_losses_follow_pytorch_for_100_steps(self):
        self.run_twins(torch.float32, 1e-4)

    def test_float64_losses_follow_pytorch_for_100_steps(self):
        self.run_twins(torch.float64, 1e-9)


if __name__ == "__main__":
    unittest.main()
