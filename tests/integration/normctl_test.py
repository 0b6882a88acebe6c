"""normctl against a real server: every subcommand, exit codes 0, 1 and 2, JSON and files."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

import numpy
import torch
from harness.layer import EVAL, Layer
from harness.safetensors import read_safetensors, write_safetensors
from harness.server import ServerTestCase, environment
from harness.tensors import from_proto

NORMCTL = os.environ.get("NORMCTL_BIN", "build/release/bin/normctl")
DONE, REFUSED, USAGE = 0, 1, 2


class NormctlCase(ServerTestCase):
    FLAGS = ("--max_features=1000",)

    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="normd-test-"))
        self.addCleanup(shutil.rmtree, self.directory)
        torch.manual_seed(1)

    def run_normctl(self, *words, server=None, env=None):
        return subprocess.run(
            [NORMCTL, f"--server={server or self.server.address}", *map(str, words)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
            env=environment(env))

    def ok(self, *words, **options):
        """What it printed, for people."""
        done = self.run_normctl(*words, **options)
        self.assertEqual(done.returncode, DONE, f"{words}: {done.stderr}")
        self.assertEqual(done.stderr, "", "progress and chatter belong on terminals alone")
        return done.stdout

    def json(self, *words):
        return json.loads(self.ok("--json", *words))

    def fails(self, code, *words, saying="", **options):
        done = self.run_normctl(*words, **options)
        self.assertEqual(done.returncode, code, f"{words}: {done.stdout}{done.stderr}")
        self.assertEqual(done.stdout, "", "errors go to stderr alone")
        for part in [saying] if isinstance(saying, str) else saying:
            self.assertIn(part, done.stderr)
        return done.stderr

    def name(self):
        return f"normctl/{self._testMethodName}"

    def create(self, num_features=3, *flags):
        self.ok("create", self.name(), f"--num_features={num_features}", *flags)
        return Layer(self.stub, self.name())

    def file(self, name):
        return self.directory / name

    def save(self, name, array):
        numpy.save(self.file(name), array)
        return self.file(name)


class Instances(NormctlCase):
    def test_create_describe_list_and_delete(self):
        made = self.json("create", self.name(), "--num_features=7", "--eps=0.001",
                         "--momentum=none", "--no_affine", "--state_dtype=float64", "--mode=eval")
        self.assertEqual(made["layer"], {"type": "BatchNorm2d", "num_features": 7, "eps": 1e-3,
                                         "momentum": None, "affine": False,
                                         "track_running_stats": True})
        self.assertEqual((made["mode"], made["version"], made["state_dtype"]),
                         ("eval", 1, "float64"))
        described = self.json("describe", self.name())
        self.assertEqual(described.pop("normalizes"), {"dimensions": ["N", "C", "H", "W"],
                                                       "reduced": ["N", "H", "W"]})
        self.assertEqual({**described, "replayed": False}, made)
        text = self.ok("describe", self.name())
        for part in (self.name(), "BatchNorm2d(7", "eval", described["uid"]):
            self.assertIn(part, text)
        listed = self.json("list", "--prefix=normctl/test_create")
        self.assertEqual([each["name"] for each in listed["instances"]], [self.name()])
        self.assertIn(self.name(), self.ok("list"))
        self.ok("delete", self.name())
        self.assertEqual(self.json("list", "--prefix=normctl/test_create")["instances"], [])
        self.fails(REFUSED, "describe", self.name(), saying=["NOT_FOUND", self.name(),
                                                            "normctl list"])

    def test_every_layer_is_created_described_and_listed(self):
        cases = {"batch_norm_1d": ("--num_features=4", "BatchNorm1d(4"),
                 "batch_norm_3d": ("--num_features=4", "BatchNorm3d(4"),
                 "layer_norm": ("--normalized_shape=3,4", "LayerNorm((3, 4)"),
                 "group_norm": ("--num_groups=2 --num_channels=4", "GroupNorm(2, 4"),
                 "instance_norm_2d": ("--num_features=4 --affine", "InstanceNorm2d(4"),
                 "rms_norm": ("--normalized_shape=8", "RMSNorm((8,)")}
        for layer, (flags, text) in cases.items():
            with self.subTest(layer):
                name = f"{self.name()}/{layer}"
                self.assertIn(text, self.ok("create", name, f"--layer={layer}", *flags.split()))
                described = self.ok("describe", name)
                self.assertIn(text, described)
                self.assertIn("normalized over", described)
                self.assertIn(text, self.ok("list"))
        self.fails(USAGE, "create", "ln", "--layer=layer_norm", "--num_features=3",
                   saying="a LayerNorm has no --num_features")

    def test_list_turns_every_page(self):
        for index in range(1100):
            Layer.create(self.stub, f"many/{index:04d}", 1)
        listed = self.json("list", "--prefix=many/")
        self.assertEqual([each["name"] for each in listed["instances"]],
                         [f"many/{index:04d}" for index in range(1100)])
        for index in range(1100):
            Layer(self.stub, f"many/{index:04d}").delete()

    def test_train_and_eval(self):
        layer = self.create()
        self.assertEqual(self.json("eval", self.name()), {"version": 2, "replayed": False})
        self.assertEqual(layer.info().mode, EVAL)
        self.assertIn("version 3", self.ok("train", self.name()))

    def test_expected_version_and_request_id(self):
        self.create()
        self.fails(REFUSED, "eval", self.name(), "--expected_version=9",
                   saying=["ABORTED", "version 1"])
        flags = (self.name(), "--request_id=01234567-89ab-cdef-0123-456789abcdef")
        self.assertFalse(self.json("eval", *flags)["replayed"])
        again = self.json("eval", *flags)
        self.assertEqual((again["replayed"], again["version"]), (True, 2))


class Compute(NormctlCase):
    DTYPES = {"<f4": torch.float32, "<f2": torch.float16, "<f8": torch.float64}

    def test_npy_files_go_through_forward_as_numpy_wrote_them(self):
        for order in ("C", "F"):
            for code, dtype in self.DTYPES.items():
                with self.subTest(order=order, dtype=code):
                    name = f"{self.name()}/{order}{code[1:]}"
                    state = "float64" if dtype == torch.float64 else "float32"
                    self.ok("create", name, "--num_features=3", f"--state_dtype={state}")
                    x = numpy.random.default_rng(0).normal(2, 3, (4, 3, 5, 6)).astype(code)
                    path = self.save("x.npy", numpy.asarray(x, order=order))
                    self.ok("forward", name, f"--input={path}", f"--output={self.file('y.npy')}")
                    y = numpy.load(self.file("y.npy"))
                    self.assertEqual((y.dtype, y.shape), (x.dtype, x.shape))
                    due = torch.nn.BatchNorm2d(3).double()(torch.tensor(x.astype("f8")))
                    limit = 4e-3 if dtype == torch.float16 else 1e-5
                    self.assertLess(numpy.abs(y - due.detach().numpy()).max(), limit)

    def test_npy_version_2_is_read(self):
        layer = self.create()
        x = numpy.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype("f4")
        with open(self.file("x.npy"), "wb") as file:
            numpy.lib.format.write_array(file, x, version=(2, 0))
        self.ok("forward", self.name(), f"--input={self.file('x.npy')}", "--mode=eval",
                f"--output={self.file('y.npy')}")
        due = layer(torch.tensor(x), mode=EVAL).numpy()
        self.assertTrue(numpy.array_equal(numpy.load(self.file("y.npy")), due))

    def test_files_that_are_no_tensors_are_usage_errors(self):
        self.create()
        big_endian = self.save("big.npy", numpy.zeros((2, 3, 2, 2), ">f4"))
        text = self.save("text.npy", numpy.array(["a", "b"]))
        integers = self.save("int.npy", numpy.zeros((2, 3, 2, 2), "i8"))
        cut = self.save("cut.npy", numpy.zeros((2, 3, 2, 2), "f4"))
        os.truncate(cut, 140)
        garbage = self.file("garbage.npy")
        garbage.write_bytes(b"no numpy at all")
        for path in (big_endian, text, integers, cut, garbage, self.file("missing.npy"),
                     self.file("x.png")):
            with self.subTest(path.name):
                self.fails(USAGE, "forward", self.name(), f"--input={path}", saying=str(path))
        good = self.save("good.npy", numpy.zeros((2, 3, 2, 2), "f4"))
        self.fails(USAGE, "forward", self.name(), f"--input={good}", "--output=y.png",
                   saying="y.png")
        self.assertEqual(Layer(self.stub, self.name()).info().version, 1)

    def test_forward_backward_step_is_a_training_step_of_pytorch(self):
        layer = self.create()
        module = torch.nn.BatchNorm2d(3)
        x, grad = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
        x_path = self.save("x.npy", x.numpy())
        grad_path = self.save("dy.npy", grad.numpy())
        forward = self.json("forward", self.name(), f"--input={x_path}", "--save_for_backward",
                            "--stats", f"--output={self.file('y.npy')}")
        self.assertEqual((forward["mode"], forward["version"], forward["num_batches_tracked"]),
                         ("train", 2, 1))
        mean = x.double().mean((0, 2, 3))
        self.assertLess(
            (torch.tensor(forward["batch_statistics"]["mean"], dtype=torch.float64) - mean)
            .abs().max().item(), 1e-6)
        backward = self.json(
            "backward", self.name(), f"--context={forward['context_id']}",
            f"--grad_output={grad_path}", "--accumulate", f"--grad_input={self.file('dx.npy')}",
            f"--grad_weight={self.file('dw.npy')}", f"--grad_bias={self.file('db.npy')}")
        self.assertTrue(backward["accumulated"])

        x.requires_grad_()
        y = module(x)
        y.backward(grad)
        for name, due in (("y", y), ("dx", x.grad), ("dw", module.weight.grad),
                          ("db", module.bias.grad)):
            got = torch.tensor(numpy.load(self.file(f"{name}.npy")))
            self.assertLess((got - due).abs().max().item(), 1e-5 * max(1, due.abs().max().item()))

        stepped = self.json("step", self.name(), "--optimizer=sgd", "--lr=0.1", "--momentum=0.9",
                            "--nesterov", "--weight_decay=0.01", "--zero_grad")
        self.assertTrue(stepped["stepped"])
        torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True,
                        weight_decay=0.01).step()
        self.assertLess((layer.state_dict()["weight"] - module.weight).abs().max().item(), 1e-6)
        self.assertFalse(self.json("step", self.name(), "--optimizer=sgd", "--lr=0.1")["stepped"])

    def test_residual_relu_and_their_gradients(self):
        self.create(4)
        x, r, dy = (numpy.random.default_rng(i).normal(size=(2, 4, 3, 3)).astype("f4")
                    for i in range(3))
        for flags in ((), ("--stream",)):
            answer = self.json("forward", self.name(), f"--input={self.save('x.npy', x)}",
                               f"--residual={self.save('r.npy', r)}", "--relu",
                               "--save_for_backward", f"--output={self.file('y.npy')}", *flags)
            y = numpy.load(self.file("y.npy"))
            due = torch.relu(torch.nn.BatchNorm2d(4)(torch.tensor(x)) + torch.tensor(r))
            self.assertLess(numpy.abs(y - due.detach().numpy()).max(), 1e-5)
            self.ok("backward", self.name(), f"--context={answer['context_id']}",
                    f"--grad_output={self.save('dy.npy', dy)}",
                    f"--grad_residual={self.file('dr.npy')}", *flags)
            self.assertTrue(numpy.array_equal(numpy.load(self.file("dr.npy")), dy * (y > 0)))

    def trained_norm(self):
        """The instance of 4 channels after a batch, as torch has it, in eval mode."""
        self.create(4)
        norm = torch.nn.BatchNorm2d(4)
        x = torch.randn(8, 4, 5, 5) * 3 + 2
        norm(x)
        self.ok("forward", self.name(), f"--input={self.save('x.npy', x.numpy())}", "--mode=train")
        return norm.eval()

    def test_fold_is_the_convolution_and_the_norm(self):
        norm = self.trained_norm()
        convolution = torch.nn.Conv2d(3, 4, 3)
        weight, bias = (each.detach().numpy() for each in convolution.parameters())
        self.ok("fold", self.name(), f"--weight={self.save('w.npy', weight)}",
                f"--bias={self.save('b.npy', bias)}", f"--output={self.file('fw.npy')}",
                f"--output_bias={self.file('fb.npy')}")
        image = torch.randn(2, 3, 8, 8)
        due = norm(convolution(image))
        folded = torch.nn.functional.conv2d(image, torch.tensor(numpy.load(self.file("fw.npy"))),
                                            torch.tensor(numpy.load(self.file("fb.npy"))))
        self.assertLess((folded - due).abs().max().item(), 1e-5)
        self.fails(USAGE, "fold", self.name(), f"--weight={self.file('w.npy')}",
                   f"--output={self.file('fw.npy')}", saying="--output_bias")

    def test_fold_of_a_transposed_convolution_in_groups(self):
        norm = self.trained_norm()
        convolution = torch.nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False)
        weight = convolution.weight.detach().numpy()
        self.ok("fold", self.name(), f"--weight={self.save('w.npy', weight)}", "--transposed",
                "--groups=2", f"--output={self.file('fw.npy')}",
                f"--output_bias={self.file('fb.npy')}")
        image = torch.randn(2, 6, 8, 8)
        folded = torch.nn.functional.conv_transpose2d(
            image, torch.tensor(numpy.load(self.file("fw.npy"))),
            torch.tensor(numpy.load(self.file("fb.npy"))), groups=2)
        due = norm(convolution(image))
        self.assertLess((folded - due).abs().max().item(), 1e-5)

    def test_backward_with_the_input_again(self):
        layer = self.create()
        x = torch.randn(4, 3, 5, 5)
        path = self.save("x.npy", x.numpy())
        self.ok("backward", self.name(), f"--input={path}", f"--grad_output={path}",
                f"--grad_input={self.file('dx.npy')}", "--mode=train")
        due = from_proto(layer.backward(x, x=x).grad_input).numpy()
        self.assertTrue(numpy.array_equal(numpy.load(self.file("dx.npy")), due))
        self.ok("backward", self.name(), f"--input={path}", f"--grad_output={path}", "--accumulate",
                "--skip_grad_input")
        self.ok("zero-grad", self.name(), "--keep_zeros")
        self.assertEqual(layer.gradients()["weight"].abs().max().item(), 0)
        self.ok("zero-grad", self.name())
        self.assertEqual(layer.gradients(), {})

    def test_a_streamed_file_is_never_in_memory(self):
        self.create(4, "--mode=eval")
        mib = 192
        x = numpy.lib.format.open_memmap(self.file("x.npy"), mode="w+", dtype="f4",
                                         shape=(mib * 64, 4, 32, 32))
        x[::1000] = 3
        x.flush()
        # Streamed without being asked to: a large file always is.
        command = [NORMCTL, f"--server={self.server.address}", "--json", "forward", self.name(),
                   f"--input={self.file('x.npy')}", f"--output={self.file('y.npy')}"]
        probe = ("import resource, subprocess, sys\n"
                 "done = subprocess.run(sys.argv[1:], check=True, capture_output=True)\n"
                 "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n")
        peak = subprocess.run([sys.executable, "-c", probe, *command], check=True, text=True,
                              capture_output=True, timeout=120, env=environment()).stdout
        y = numpy.load(self.file("y.npy"), mmap_mode="r")
        self.assertEqual((y.shape, y.dtype), (x.shape, x.dtype))
        for sample in (0, 1, 1000, len(x) - 1):
            due = Layer(self.stub, self.name()).forward(torch.tensor(x[sample:sample + 1]))
            self.assertTrue(numpy.array_equal(y[sample:sample + 1],
                                              from_proto(due.output).numpy()))
        if "san" not in os.environ.get("NORMD_BIN", ""):
            self.assertLess(int(peak), 64 * 1024)  # KiB

    def test_a_streamed_file_that_fails_leaves_no_output(self):
        self.create(4)
        path = self.save("x.npy", numpy.zeros((2, 5, 3, 3), "f4"))
        self.fails(REFUSED, "forward", self.name(), f"--input={path}", "--stream",
                   f"--output={self.file('y.npy')}", saying="num_features")
        self.fails(USAGE, "forward", self.name(), f"--input={path}", "--stream",
                   f"--output={self.file('no/y.npy')}", saying="cannot write")
        with open(path, "r+b") as file:
            file.truncate(200)
        self.fails(USAGE, "forward", self.name(), f"--input={path}", "--stream",
                   f"--output={self.file('y.npy')}", saying=["x.npy", "takes 360 bytes"])
        self.assertEqual([each.name for each in self.directory.iterdir()], ["x.npy"])

    def test_streams_and_formats_answer_alike(self):
        self.create()
        path = self.save("x.npy", numpy.random.default_rng(0).normal(size=(2, 3, 9, 9)).astype("f4"))
        answers = []
        for flags in ([], ["--stream"], ["--memory_format=channels_last"],
                      ["--memory_format=channels_last", "--stream"]):
            self.ok("forward", self.name(), f"--input={path}", "--mode=train",
                    f"--output={self.file('y.npy')}", *flags)
            answers.append(numpy.load(self.file("y.npy")))
        for answer in answers[1:]:
            self.assertLess(numpy.abs(answer - answers[0]).max(), 1e-6)

    def test_bfloat16_goes_through_safetensors(self):
        self.create()
        x = torch.randn(2, 3, 4, 4).to(torch.bfloat16)
        write_safetensors(self.file("x.safetensors"), {"other": torch.zeros(2), "x": x})
        self.ok("forward", self.name(), f"--input={self.file('x.safetensors')}:x",
                f"--output={self.file('y.safetensors')}:y", "--mode=train")
        y = read_safetensors(self.file("y.safetensors"))[0]["y"]
        self.assertEqual((y.dtype, y.shape), (torch.bfloat16, x.shape))
        due = torch.nn.BatchNorm2d(3)(x.float())
        self.assertLess((y.float() - due).abs().max().item(), 0.02)
        self.fails(USAGE, "forward", self.name(), f"--input={self.file('x.safetensors')}:nothing",
                   saying="nothing")

    def test_a_refused_tensor_is_told_with_its_field(self):
        self.create()
        path = self.save("x.npy", numpy.zeros((2, 5, 3, 3), "f4"))
        self.fails(REFUSED, "forward", self.name(), f"--input={path}",
                   saying=["INVALID_ARGUMENT", "input.shape", "5", "3"])
        error = json.loads(self.fails(REFUSED, "--json", "forward", self.name(),
                                      f"--input={path}"))["error"]
        self.assertEqual((error["code"], error["field"]), ("INVALID_ARGUMENT", "input.shape"))
        self.assertFalse(self.file("y.npy").exists())


class State(NormctlCase):
    def test_state_goes_to_a_file_and_back(self):
        layer = self.create()
        x = torch.randn(4, 3, 5, 5)
        layer.backward(x, x=x, accumulate=True)
        layer.forward(x)
        path = self.file("bn.safetensors")
        got = self.json("state", "get", self.name(), f"--output={path}", "--gradients")
        self.assertEqual(got["tensors"]["weight"], {"dtype": "float32", "shape": [3]})
        tensors, metadata = read_safetensors(path)
        self.assertEqual(metadata["format"], "pt")
        for key, value in layer.state_dict().items():
            self.assertTrue(torch.equal(tensors[key], value), key)
        before = layer.state_dict()
        self.ok("reset-parameters", self.name())
        self.assertEqual(layer.state_dict()["num_batches_tracked"].item(), 0)
        self.ok("state", "set", self.name(), f"--input={path}")
        for key, value in layer.state_dict().items():
            self.assertTrue(torch.equal(before[key], value), key)
        self.ok("reset-running-stats", self.name())
        self.assertEqual(layer.state_dict()["running_mean"].abs().max().item(), 0)
        self.assertIn("running_var", self.ok("state", "get", self.name()))

    def test_a_torch_state_dict_is_taken_and_a_wrong_one_refused(self):
        layer = self.create()
        module = torch.nn.BatchNorm2d(3)
        module(torch.randn(4, 3, 5, 5) * 2 + 1)
        path = self.file("torch.safetensors")
        write_safetensors(path, module.state_dict())
        self.ok("state", "set", self.name(), f"--input={path}")
        self.assertTrue(torch.equal(layer.state_dict()["running_var"], module.running_var))
        write_safetensors(path, {"weight": torch.ones(3)})
        self.fails(REFUSED, "state", "set", self.name(), f"--input={path}",
                   saying=["FAILED_PRECONDITION", "running_mean"])
        self.fails(USAGE, "state", "set", self.name(), "--input=x.npy", saying="x.npy")

    def test_checkpoints_are_saved_listed_and_loaded(self):
        layer = self.create()
        layer.forward(torch.randn(4, 3, 5, 5))
        before = layer.state_dict()
        saved = self.json("checkpoint", "save")
        self.assertEqual((saved["reason"], saved["replayed"]), ("manual", False))
        layer.forward(torch.randn(4, 3, 5, 5))
        listed = self.json("checkpoint", "list")["checkpoints"]
        self.assertEqual(listed[0]["id"], saved["id"])
        self.assertTrue(listed[0]["sound"])
        self.assertIn(saved["id"], self.ok("checkpoint", "list"))
        loaded = self.json("checkpoint", "load", saved["id"], f"--names={self.name()}")
        self.assertEqual(loaded["instances"], [{"name": self.name(),
                                                "version": layer.info().version}])
        for key, value in layer.state_dict().items():
            self.assertTrue(torch.equal(before[key], value), key)
        self.assertIn(saved["id"], self.ok("checkpoint", "load"))
        self.fails(REFUSED, "checkpoint", "load", "99999999-manual",
                   saying=["NOT_FOUND", "checkpoint list"])


class Server(NormctlCase):
    def test_info_and_health(self):
        info = self.json("info")
        self.assertEqual(info["limits"]["max_features"], 1000)
        self.assertIn(info["version"], self.ok("info"))
        self.assertEqual(self.json("health"), {"status": "SERVING"})
        self.assertIn("SERVING", self.ok("health", "--service=normd.v1.NormService"))
        self.assertNotEqual(self.run_normctl("health", "--service=nothing").returncode, DONE)

    def test_no_server_says_how_to_start_one(self):
        error = self.fails(REFUSED, "info", "--timeout=3s", server="127.0.0.1:1",
                           saying=["127.0.0.1:1", "normd --listen"])
        self.assertNotIn("debug_error_string", error)

    def test_the_environment_names_the_server(self):
        done = subprocess.run([NORMCTL, "health"], capture_output=True, text=True, check=False,
                              env=environment({"NORMD_SERVER": self.server.address}))
        self.assertEqual((done.returncode, done.stdout), (DONE, "SERVING\n"))

    def test_bench_measures(self):
        for flags in (["--dtype=float32"], ["--op=backward", "--dtype=bfloat16",
                                            "--memory_format=channels_last"]):
            got = self.json("bench", "--shape=2,8,7,7", "--concurrency=2", "--duration=500ms",
                            *flags)
            self.assertGreater(got["requests"], 10)
            latency = got["latency_ms"]
            self.assertGreater(latency["p50"], 0)
            self.assertLessEqual(latency["p50"], latency["p90"])
            self.assertLessEqual(latency["p99"], latency["max"])
            self.assertAlmostEqual(got["requests_per_s"], got["requests"] / got["seconds"],
                                   delta=got["requests_per_s"] * 0.01)
        self.assertEqual(self.json("list", "--prefix=normctl-bench")["instances"], [])
        self.assertIn("P99", self.ok("bench", "--shape=2,8,7,7", "--duration=200ms"))

    def test_completion_is_a_script_that_its_shell_reads(self):
        script = self.ok("completion", "bash")
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True,
                              check=False)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        words = subprocess.run(
            ["bash", "-c", script + "\nCOMP_WORDS=(normctl checkpoint '') COMP_CWORD=2; _normctl;"
             "echo ${COMPREPLY[@]}"], text=True, capture_output=True, check=False).stdout
        for word in ("save", "load", "list"):
            self.assertIn(word, words)
        for shell in ("zsh", "fish"):
            self.assertIn("checkpoint", self.ok("completion", shell))

    def test_version(self):
        self.assertRegex(self.ok("version"), r"^normctl \d+\.\d+\.\d+\n$")


class Usage(NormctlCase):
    def test_help_of_everything(self):
        text = self.ok("--help")
        commands = ("create", "list", "describe", "delete", "train", "eval", "forward", "backward",
                    "zero-grad", "step", "state", "reset-running-stats", "reset-parameters",
                    "checkpoint", "info", "health", "bench", "completion", "version")
        for command in commands:
            self.assertIn(command, text)
            self.assertIn("--help", self.ok(command, "--help"))

    def test_usage_errors_are_2_and_say_where_help_is(self):
        bare = subprocess.run([NORMCTL], capture_output=True, text=True, check=False)
        self.assertEqual(bare.returncode, USAGE)
        self.assertIn("create", bare.stderr)
        self.fails(USAGE, "creat", "bn", saying=["creat", "create", "--help"])
        self.fails(USAGE, "create", saying=["name", "--help"])
        self.fails(USAGE, "create", "bn", saying="num_features")
        self.fails(USAGE, "create", "bn", "--num_features=many", saying="num_features")
        self.fails(USAGE, "create", "bn", "--num_feature=3", saying="--num_features")
        self.fails(USAGE, "create", "bn", "--num_features=3", "--momentum=most", saying="momentum")
        self.fails(USAGE, "create", "bn", "--num_features=3", "--mode=test", saying="mode")
        self.fails(USAGE, "list", "everything", saying="everything")
        self.fails(USAGE, "state", saying="normctl state --help")
        self.fails(USAGE, "step", "bn", "--optimizer=sgd", saying="--lr")
        self.fails(USAGE, "step", "bn", "--optimizer=lion", saying="lion")
        self.fails(USAGE, "backward", "bn", "--grad_output=x.npy", saying="--context")
        self.fails(USAGE, "info", "--timeout=soon", saying="timeout")
        error = json.loads(self.fails(USAGE, "--json", "create", "bn"))["error"]
        self.assertIn("num_features", error["message"])

    def test_what_the_server_refuses_is_1(self):
        for words, code in ((("create", "../bn", "--num_features=3"), "INVALID_ARGUMENT"),
                            (("create", "bn", "--num_features=0"), "INVALID_ARGUMENT"),
                            (("create", "bn", "--num_features=3", "--eps=-1"), "INVALID_ARGUMENT"),
                            (("create", "bn", "--num_features=2000"), "RESOURCE_EXHAUSTED"),
                            (("train", "nobody"), "NOT_FOUND")):
            with self.subTest(words):
                self.fails(REFUSED, *words, saying=code)
                error = json.loads(self.fails(REFUSED, "--json", *words))["error"]
                self.assertEqual(error["code"], code)
        self.fails(REFUSED, "create", "bn", "--num_features=2000", saying="--max_features")


if __name__ == "__main__":
    unittest.main()
