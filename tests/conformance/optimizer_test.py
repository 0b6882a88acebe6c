"""Step is torch.optim: SGD, Adam and AdamW, over several steps, state and all.

The gradients that the server accumulated are read back and given to torch's
optimizer, so that the update rule alone is compared.
"""

import itertools
import unittest

import grpc
import torch
from harness import layer as layers
from harness.errors import refused
from harness.layer import Layer
from harness.seed import SEED, generator, torch_generator
from harness.server import ServerTestCase
from normd.v1 import optimizer_pb2

STEPS = 6


def sgd_cases():
    for momentum, weight_decay, maximize in itertools.product((0, 0.9), (0, 0.05), (False, True)):
        for dampening, nesterov in ((0, False), (0.3, False), (0, True)):
            if momentum or not (nesterov or dampening):
                yield "sgd", dict(lr=0.1, momentum=momentum, dampening=dampening,
                                  weight_decay=weight_decay, nesterov=nesterov, maximize=maximize)
    yield "sgd", dict(lr=0.0, momentum=0.9)
    yield "sgd", dict(lr=0.05, momentum=1.5)


def adam_cases():
    for rule, amsgrad, maximize in itertools.product(("adam", "adamw"), (False, True),
                                                     (False, True)):
        for weight_decay in (None, 0.0, 0.1):
            arguments = dict(lr=0.01, amsgrad=amsgrad, maximize=maximize)
            if weight_decay is not None:
                arguments["weight_decay"] = weight_decay
            yield rule, arguments
        yield rule, dict(amsgrad=amsgrad, maximize=maximize)  # every default
        yield rule, dict(lr=0.1, beta1=0.0, beta2=0.5, eps=1e-3, amsgrad=amsgrad,
                         maximize=maximize)
        yield rule, dict(lr=0.02, beta1=0.5, beta2=0.0, eps=1e-4, amsgrad=amsgrad,
                         maximize=maximize)


def message(rule, arguments):
    kind = optimizer_pb2.Sgd if rule == "sgd" else optimizer_pb2.Adam
    return optimizer_pb2.Optimizer(**{rule: kind(**arguments)})


def torch_optimizer(rule, parameters, arguments):
    arguments = dict(arguments)
    if "beta1" in arguments:
        arguments["betas"] = (arguments.pop("beta1"), arguments.pop("beta2"))
    return {"sgd": torch.optim.SGD, "adam": torch.optim.Adam,
            "adamw": torch.optim.AdamW}[rule](parameters, **arguments)


class Conformance(ServerTestCase):
    def run_case(self, index, rule, arguments, dtype):
        rng = torch_generator(generator(f"{rule}/{index}"))
        channels = 5
        layer = Layer.create(self.stub, f"{rule}/{dtype}/{index}", channels, dtype=dtype)
        module = torch.nn.BatchNorm2d(channels, dtype=dtype)
        with torch.no_grad():
            module.weight.copy_(torch.randn(channels, generator=rng, dtype=dtype))
            module.bias.copy_(torch.randn(channels, generator=rng, dtype=dtype))
        layer.load_state_dict(module.state_dict())
        optimizer = torch_optimizer(rule, module.parameters(), arguments)
        rounding = 1e-6 if dtype == torch.float32 else 1e-14

        for step in range(STEPS):
            for _ in range(1 + step % 2):  # gradients add up between steps
                x = torch.randn(4, channels, 3, 3, generator=rng, dtype=dtype)
                grad = torch.randn(4, channels, 3, 3, generator=rng, dtype=dtype)
                layer.backward(grad, layer.forward(x, save=True).context_id, accumulate=True)
            gradients = layer.gradients()
            self.assertEqual(set(gradients), {"weight", "bias"})
            for key, value in gradients.items():
                getattr(module, key).grad = value
            optimizer.step()
            answer = layer.step(message(rule, arguments), zero_grad=step % 3 == 0)
            self.assertTrue(answer.stepped)
            self.assertEqual(bool(layer.gradients()), step % 3 != 0)
            if step % 3 == 1:
                layer.zero_grad()
            state = layer.state_dict()
            for key in ("weight", "bias"):
                due = getattr(module, key).detach()
                off = (state[key] - due).abs().max().item()
                self.assertLessEqual(off, rounding * (step + 1) * max(1, due.abs().max().item()),
                                     f"{key} after step {step}")
        self.compare_state(layer, module, optimizer, rounding)
        self.assertEqual(layer.info().optimizer, rule)
        layer.delete()

    def compare_state(self, layer, module, optimizer, rounding):
        got = layer.optimizer_state()
        due = {}
        for key in ("weight", "bias"):
            for name, value in optimizer.state[getattr(module, key)].items():
                if value is not None:
                    due[f"{key}.{name}"] = torch.as_tensor(value)
        self.assertEqual(set(got), set(due))
        for key, value in due.items():
            off = (got[key].double().flatten() - value.double().flatten()).abs().max().item()
            self.assertLessEqual(off, 10 * rounding * max(1, value.double().abs().max().item()),
                                 key)

    def run_cases(self, cases):
        for index, (rule, arguments) in enumerate(cases):
            for dtype in (torch.float32, torch.float64):
                with self.subTest(NORMD_SEED=SEED, rule=rule, dtype=dtype, **arguments):
                    self.run_case(index, rule, arguments, dtype)

    def test_sgd_is_torch_optim_sgd(self):
        self.run_cases(sgd_cases())

    def test_adam_and_adamw_are_torch_optims(self):
        self.run_cases(adam_cases())


class Rules(ServerTestCase):
    def layer(self, **arguments):
        layer = Layer.create(self.stub, f"rules/{layers.request_id()}", 3, **arguments)
        self.accumulate(layer)
        return layer

    def accumulate(self, layer):
        x, grad = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
        layer.backward(grad, layer.forward(x, save=True).context_id, accumulate=True)

    def test_without_gradients_a_step_changes_nothing(self):
        layer = Layer.create(self.stub, "rules/none", 3)
        answer = layer.step(message("adam", {}))
        self.assertFalse(answer.stepped)
        self.assertTrue(torch.equal(layer.state_dict()["weight"], torch.ones(3)))
        self.assertEqual(layer.optimizer_state(), {})

    def test_zeroed_gradients_still_decay_and_roll_on(self):
        layer = self.layer()
        sgd = message("sgd", dict(lr=0.1, momentum=0.9, weight_decay=0.1))
        module = torch.nn.BatchNorm2d(3)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for key, value in layer.gradients().items():
            getattr(module, key).grad = value
        optimizer.step()
        layer.step(sgd)
        layer.zero_grad(set_to_none=False)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        self.assertTrue(layer.step(sgd).stepped)
        for key in ("weight", "bias"):
            self.assertLess((layer.state_dict()[key] - getattr(module, key)).abs().max().item(),
                            1e-6)

    def test_another_rule_needs_reset_optimizer(self):
        layer = self.layer()
        layer.step(message("sgd", dict(lr=0.1, momentum=0.9)))
        version = layer.info().version
        with refused(self, grpc.StatusCode.FAILED_PRECONDITION, message="reset_optimizer"):
            layer.step(message("adam", {}))
        self.assertEqual(layer.info().version, version)
        self.assertTrue(layer.step(message("adam", {}), reset_optimizer=True).stepped)
        self.assertEqual(layer.info().optimizer, "adam")
        self.assertEqual({key.split(".")[1] for key in layer.optimizer_state()},
                         {"step", "exp_avg", "exp_avg_sq"})

    def test_settings_may_change_from_step_to_step(self):
        layer = self.layer()
        module = torch.nn.BatchNorm2d(3)
        for key, value in layer.gradients().items():
            getattr(module, key).grad = value
        optimizer = torch.optim.SGD(module.parameters(), lr=1, momentum=0.5)
        for lr in (0.5, 0.25, 0.0):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            layer.step(message("sgd", dict(lr=lr, momentum=0.5)))
        self.assertLess((layer.state_dict()["weight"] - module.weight).abs().max().item(), 1e-6)

    def test_no_parameters_no_step(self):
        layer = Layer.create(self.stub, "rules/plain", 3, affine=False)
        with refused(self, grpc.StatusCode.FAILED_PRECONDITION):
            layer.step(message("sgd", dict(lr=0.1)))

    def test_optimizer_state_survives_a_restart(self):
        layer = self.layer()
        adam = message("adam", dict(lr=0.1, amsgrad=True))
        layer.step(adam)
        before = layer.optimizer_state()
        gradients = layer.gradients()
        self.server.restart()
        type(self).stub = layer.stub = self.server.stub
        after = layer.optimizer_state()
        self.assertEqual(set(before), set(after))
        for key in before:
            self.assertTrue(torch.equal(before[key], after[key]), key)
        for key, value in layer.gradients().items():
            self.assertTrue(torch.equal(value, gradients[key]), key)
        layer.step(adam)
        self.assertEqual(layer.optimizer_state()["weight.step"].item(), 2)


if __name__ == "__main__":
    unittest.main()
