"""A checkpoint's file is a state_dict that torch loads as it is."""

import unittest

import torch
from harness.layer import EVAL, Layer
from harness.safetensors import read_safetensors
from harness.server import Server
from normd.v1 import norm_service_pb2 as rpc, optimizer_pb2

STATE_KEYS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


class CheckpointInTorch(unittest.TestCase):
    def setUp(self):
        self.server = Server().start()
        self.addCleanup(self.server.close)

    def saved_file(self, name):
        """The file of an instance in a checkpoint made now."""
        saved = self.server.stub.SaveCheckpoint(rpc.SaveCheckpointRequest()).checkpoint
        directory = self.server.checkpoint_directory() / saved.id
        files = [path for path in directory.rglob("*.safetensors")
                 if path.stem == name.replace("/", "%2F") or path.stem == name]
        self.assertEqual(len(files), 1, list(directory.rglob("*")))
        return files[0]

    def trained(self, name, channels, **arguments):
        layer = Layer.create(self.server.stub, name, channels, **arguments)
        dtype = arguments.get("dtype", torch.float32)
        for _ in range(5):
            x = torch.randn(4, channels, 6, 6, dtype=dtype) * 3 + 1
            context = layer.forward(x, save=True).context_id
            layer.backward(torch.randn_like(x), context, accumulate=True)
            if arguments.get("affine", True):
                layer.step(optimizer_pb2.Optimizer(adam=optimizer_pb2.Adam(lr=0.1)))
        return layer

    def check(self, name, channels, **arguments):
        layer = self.trained(name, channels, **arguments)
        tensors, metadata = read_safetensors(self.saved_file(name))
        self.assertTrue(metadata)
        state = {key: value for key, value in tensors.items() if key in STATE_KEYS}
        dtype = arguments.get("dtype", torch.float32)
        module = torch.nn.BatchNorm2d(channels, **{**arguments, "dtype": dtype})
        module.load_state_dict(state, strict=True)
        for key, value in layer.state_dict().items():
            self.assertTrue(torch.equal(value, module.state_dict()[key]), key)
        x = torch.randn(3, channels, 5, 7, dtype=dtype)
        for mode in (EVAL, 1):
            module.train(mode != EVAL)
            due = module(x).detach()
            got = layer(x, mode=mode)
            self.assertLessEqual((got - due).abs().max().item(), 1e-5 * due.abs().max().item())
        return tensors

    def test_a_trained_instance_loads_strictly(self):
        tensors = self.check("net/layer1.0.bn", 7)
        # Optimizer and gradients lie beside the state_dict, under prefixed keys.
        self.assertGreater(len(tensors), len(STATE_KEYS))

    def test_a_float64_instance_loads_strictly(self):
        self.check("double", 3, dtype=torch.float64)

    def test_without_affine_there_are_no_parameters(self):
        tensors = self.check("plain", 3, affine=False)
        self.assertFalse({"weight", "bias"} & set(tensors))

    def test_without_running_statistics_there_are_none(self):
        tensors = self.check("untracked", 3, track_running_stats=False)
        self.assertFalse({"running_mean", "running_var", "num_batches_tracked"} & set(tensors))

    def test_cumulative_average(self):
        self.check("cumulative", 3, momentum=None)


if __name__ == "__main__":
    unittest.main()
