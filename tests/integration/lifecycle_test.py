"""Real processes: started, stopped, killed, damaged and brought back."""

import json
import os
import pathlib
import queue
import shutil
import signal
import socket
import tempfile
import time
import unittest

import grpc
import health_pb2
import health_pb2_grpc
import torch
from harness.errors import refused
from harness.layer import EVAL, TRAIN, Layer, request_id
from harness.server import NORMD, Server, eventually, run_normd
from harness.tensors import from_proto, to_proto
from normd.v1 import norm_service_pb2 as rpc, norm_service_pb2_grpc, optimizer_pb2

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
CANCELLED = grpc.StatusCode.CANCELLED


def everything(stub):
    """All state of all instances."""
    instances = stub.ListInstances(rpc.ListInstancesRequest(page_size=1000)).instances
    return {i.name: stub.GetState(rpc.GetStateRequest(name=i.name, include_gradients=True,
                                                      include_optimizer=True))
            for i in instances}


class LifecycleCase(unittest.TestCase):
    def server(self, *flags, **options):
        server = Server(*flags, **options)
        self.addCleanup(server.close)
        return server

    def populate(self, server):
        """Instances of every kind, trained a little, with gradients and optimizer state."""
        stub = server.stub
        for name, arguments in {
                "plain": {}, "net/layer1.0/bn": dict(momentum=None), "double": dict(dtype=torch.float64),
                "bare": dict(affine=False, track_running_stats=False),
                "strange": dict(momentum=-1.2),  # its running_var goes below 0
        }.items():
            layer = Layer.create(stub, name, 5, **arguments)
            for _ in range(3):
                x = torch.randn(4, 5, 3, 3, dtype=arguments.get("dtype", torch.float32)) * 3
                layer.backward(x, layer.forward(x, save=True).context_id, accumulate=True)
            if name in ("plain", "double"):
                layer.step(optimizer_pb2.Optimizer(adam=optimizer_pb2.Adam(amsgrad=True)))
            if name == "plain":
                layer.eval()
        return everything(stub)

    def save(self, server):
        return server.stub.SaveCheckpoint(rpc.SaveCheckpointRequest()).checkpoint

    def change(self, server):
        """Some change that everything() sees."""
        Layer(server.stub, "plain").forward(torch.randn(4, 5, 3, 3), mode=TRAIN)

    def drop_store(self, server):
        """Leaves of the state directory the checkpoints alone, as a new machine would have them."""
        checkpoints = server.checkpoint_directory()
        for path in server.state_dir.iterdir():
            if path != checkpoints and checkpoints not in path.parents:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


class Restart(LifecycleCase):
    def test_a_clean_restart_keeps_everything(self):
        server = self.server().start()
        before = self.populate(server)
        self.assertLess(
            Layer(server.stub, "strange").state_dict()["running_var"].min().item(), 0)
        server.restart()
        self.assertEqual(everything(server.stub), before)

    def test_eval_output_is_the_same_bit_for_bit(self):
        server = self.server().start()
        self.populate(server)
        x = torch.randn(4, 5, 9, 9)
        before = Layer(server.stub, "plain").forward(x, mode=EVAL).output.data
        self.save(server)
        server.kill()
        server.start()
        self.assertEqual(Layer(server.stub, "plain").forward(x, mode=EVAL).output.data, before)

    def test_a_kill_after_save_checkpoint_keeps_everything(self):
        for durability in ("interval", "update", "none"):
            with self.subTest(durability):
                server = self.server(f"--durability={durability}").start()
                before = self.populate(server)
                self.save(server)
                server.kill()
                server.start()
                self.assertEqual(everything(server.stub), before)

    def test_with_durability_update_a_kill_loses_no_acknowledged_change(self):
        server = self.server("--durability=update").start()
        before = self.populate(server)
        Layer.create(server.stub, "gone", 3).delete()
        server.kill()
        server.start()
        self.assertEqual(everything(server.stub), before)

    def test_with_durability_interval_a_kill_loses_no_more_than_the_interval(self):
        server = self.server("--durability=interval", "--checkpoint_interval=300ms").start()
        before = self.populate(server)
        time.sleep(2)
        server.kill()
        server.start()
        self.assertEqual(everything(server.stub), before)

    def test_with_durability_none_a_kill_goes_back_to_the_checkpoint(self):
        server = self.server("--durability=none").start()
        before = self.populate(server)
        self.save(server)
        self.change(server)
        server.kill()
        server.start()
        self.assertEqual(everything(server.stub), before)

    def test_with_durability_none_a_clean_stop_keeps_what_was_asked_for(self):
        server = self.server("--durability=none").start()
        before = self.populate(server)
        self.save(server)
        self.change(server)
        server.restart()
        self.assertEqual(everything(server.stub), before)

    def test_a_deleted_instance_stays_deleted(self):
        server = self.server().start()
        self.populate(server)
        self.save(server)
        Layer(server.stub, "bare").delete()
        server.restart()
        self.assertNotIn("bare", everything(server.stub))

    def test_ten_restarts_change_nothing(self):
        server = self.server().start()
        before = self.populate(server)
        for _ in range(10):
            server.restart()
        self.assertEqual(everything(server.stub), before)

    def test_a_request_id_is_remembered_across_restart_and_kill(self):
        server = self.server("--durability=update").start()
        layer = Layer.create(server.stub, "bn", 3)
        x, again = torch.randn(4, 3, 5, 5), request_id()
        first = layer.forward(x, request_id=again)
        for bring_back in (server.restart, lambda: (server.kill(), server.start())):
            bring_back()
            layer.stub = server.stub
            answer = layer.forward(x, request_id=again)
            self.assertTrue(answer.replayed)
            self.assertEqual((answer.version, answer.num_batches_tracked, answer.output.data),
                             (first.version, first.num_batches_tracked, first.output.data))
        self.assertEqual(layer.info().num_batches_tracked, 1)


class Drain(LifecycleCase):
    """SIGTERM: what is under way is finished, what is new is refused."""

    def open_stream(self, server):
        """A ForwardStream that the server has begun to read; feed(None) sends the rest."""
        self.x = torch.randn(8, 4, 32, 32)
        message = to_proto(self.x)
        data, message.data = message.data, b""
        parts = queue.Queue()
        parts.put(rpc.ForwardStreamRequest(header=rpc.ForwardRequest(name="bn", input=message)))
        parts.put(rpc.ForwardStreamRequest(chunk=data[:1000]))
        call = server.stub.ForwardStream(iter(parts.get, None))
        eventually(lambda: server.stub.GetServerInfo(
            rpc.GetServerInfoRequest()).memory_in_use >= len(data))

        def finish():
            parts.put(rpc.ForwardStreamRequest(chunk=data[1000:]))
            parts.put(None)
            answer = list(call)
            return answer[0].header, b"".join(part.chunk for part in answer[1:])
        self.addCleanup(parts.put, None)
        return call, finish

    def is_refused(self, server):
        """Whether a new connection, or its call, is refused."""
        try:
            with server.connect() as channel:
                stub = norm_service_pb2_grpc.NormServiceStub(channel)
                stub.GetInstance(rpc.GetInstanceRequest(name="bn"), timeout=10)
        except grpc.RpcError as error:
            self.assertEqual(error.code(), UNAVAILABLE)
            return True
        return False

    def test_sigterm_and_sigint_end_an_idle_server_at_once(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            server = self.server().start()
            began = time.monotonic()
            server.signal(number)
            server.wait()
            self.assertLess(time.monotonic() - began, 10)

    def test_work_under_way_is_finished_and_kept(self):
        server = self.server("--drain_timeout=60s").start()
        layer = Layer.create(server.stub, "bn", 4)
        health = health_pb2_grpc.HealthStub(server.connect())
        watch = health.Watch(health_pb2.HealthCheckRequest())
        self.assertEqual(next(watch).status, health_pb2.HealthCheckResponse.SERVING)
        _, finish = self.open_stream(server)

        server.signal(signal.SIGTERM)
        self.assertEqual(next(watch).status, health_pb2.HealthCheckResponse.NOT_SERVING)
        watch.cancel()
        eventually(lambda: self.is_refused(server))
        self.assertTrue(server.alive())

        header, data = finish()
        self.assertEqual(header.num_batches_tracked, 1)
        due = torch.nn.BatchNorm2d(4)(self.x).detach()
        got = from_proto(header.output, data)
        self.assertLess((got - due).abs().max().item(), 1e-5)
        began = time.monotonic()
        server.wait()
        self.assertLess(time.monotonic() - began, 20)
        server.start()
        layer.stub = server.stub
        self.assertEqual(layer.info().num_batches_tracked, 1)

    def test_work_that_never_ends_is_cut_at_the_drain_timeout(self):
        server = self.server("--drain_timeout=1s").start()
        Layer.create(server.stub, "bn", 4)
        call, _ = self.open_stream(server)
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        with refused(self, (UNAVAILABLE, CANCELLED)):
            list(call)
        server.wait()
        took = time.monotonic() - began
        self.assertGreater(took, 0.5)
        self.assertLess(took, 10)
        server.start()
        self.assertEqual(Layer(server.stub, "bn").info().num_batches_tracked, 0)

    def test_idle_watchers_do_not_hold_the_server_up(self):
        server = self.server("--drain_timeout=3s").start()
        watch = health_pb2_grpc.HealthStub(server.connect()).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        began = time.monotonic()
        server.stop()
        self.assertLess(time.monotonic() - began, 10)


class Checkpoints(LifecycleCase):
    def files(self, server, checkpoint):
        return sorted((server.checkpoint_directory() / checkpoint.id).rglob("*.safetensors"))

    def flip(self, path, at=-3):
        data = bytearray(path.read_bytes())
        data[at] ^= 0x40
        path.write_bytes(data)

    def damage(self, server, checkpoint, how):
        directory = server.checkpoint_directory() / checkpoint.id
        file = self.files(server, checkpoint)[0]
        manifest = directory / "manifest.json"
        {
            "a byte of a tensor": lambda: self.flip(file),
            "a byte of a header": lambda: self.flip(file, 20),
            "a file cut": lambda: os.truncate(file, file.stat().st_size // 2),
            "a file emptied": lambda: os.truncate(file, 0),
            "a file lost": file.unlink,
            "a byte of the manifest": lambda: self.flip(manifest, 30),
            "the manifest cut": lambda: os.truncate(manifest, manifest.stat().st_size // 2),
            "the manifest lost": manifest.unlink,
        }[how]()
        return manifest if "manifest" in how else file

    DAMAGES = ("a byte of a tensor", "a byte of a header", "a file cut", "a file emptied",
               "a file lost", "a byte of the manifest", "the manifest cut", "the manifest lost")

    def test_load_goes_back_to_what_was_saved(self):
        server = self.server().start()
        before = self.populate(server)
        checkpoint = self.save(server)
        self.assertEqual((checkpoint.reason, checkpoint.instance_count, checkpoint.sound),
                         ("manual", len(before), True))
        self.assertEqual(
            checkpoint.total_bytes,
            sum(path.stat().st_size for path in
                (server.checkpoint_directory() / checkpoint.id).rglob("*") if path.is_file()))
        self.change(server)
        Layer(server.stub, "bare").delete()
        Layer.create(server.stub, "other", 2)
        changed = everything(server.stub)

        loaded = server.stub.LoadCheckpoint(rpc.LoadCheckpointRequest(checkpoint_id=checkpoint.id))
        self.assertEqual(loaded.checkpoint.id, checkpoint.id)
        self.assertEqual([each.name for each in loaded.instances], sorted(before))
        after = everything(server.stub)
        self.assertEqual(set(after), {*before, "other"})
        for name, was in before.items():
            self.assertEqual(after[name].state, was.state, name)
            self.assertEqual(after[name].instance.mode, was.instance.mode)
        # Versions never go back, so that nobody's expected_version lies.
        self.assertEqual(after["plain"].version, changed["plain"].version + 1)
        self.assertEqual(after["bare"].version, before["bare"].version)
        self.assertEqual(after["other"], changed["other"])
        for each in loaded.instances:
            self.assertEqual(each.version, after[each.name].version)

    def test_load_of_some_names_leaves_the_others(self):
        server = self.server().start()
        self.populate(server)
        self.save(server)
        for name in ("plain", "strange"):
            Layer(server.stub, name).forward(torch.randn(4, 5, 3, 3), mode=TRAIN)
        changed = everything(server.stub)
        loaded = server.stub.LoadCheckpoint(rpc.LoadCheckpointRequest(names=["strange"]))
        self.assertEqual(loaded.instance_count, 1)
        after = everything(server.stub)
        self.assertEqual(after["plain"], changed["plain"])
        self.assertNotEqual(after["strange"].state, changed["strange"].state)

    def test_none_there(self):
        server = self.server().start()
        with refused(self, grpc.StatusCode.NOT_FOUND):
            server.stub.LoadCheckpoint(rpc.LoadCheckpointRequest())
        self.assertEqual(len(server.stub.ListCheckpoints(
            rpc.ListCheckpointsRequest()).checkpoints), 0)

    def test_generations_are_listed_newest_first_and_the_oldest_go(self):
        server = self.server("--keep_checkpoints=3").start()
        self.populate(server)
        made = [self.save(server).id for _ in range(5)]
        listed = server.stub.ListCheckpoints(rpc.ListCheckpointsRequest()).checkpoints
        self.assertEqual([each.id for each in listed], made[:1:-1])
        self.assertEqual(made, sorted(made))
        self.assertTrue(all(each.sound for each in listed))
        first = server.stub.ListCheckpoints(rpc.ListCheckpointsRequest(page_size=2))
        second = server.stub.ListCheckpoints(rpc.ListCheckpointsRequest(
            page_size=2, page_token=first.next_page_token))
        self.assertEqual([each.id for each in (*first.checkpoints, *second.checkpoints)],
                         made[:1:-1])
        self.assertEqual(second.next_page_token, "")

    def test_a_shutdown_leaves_a_checkpoint(self):
        server = self.server().start()
        self.populate(server)
        server.restart()
        newest = server.stub.ListCheckpoints(rpc.ListCheckpointsRequest()).checkpoints[0]
        self.assertEqual(newest.reason, "shutdown")
        self.assertTrue(newest.sound)

    def test_the_interval_makes_checkpoints(self):
        server = self.server("--checkpoint_interval=300ms").start()
        self.populate(server)

        def reasons():
            listed = server.stub.ListCheckpoints(rpc.ListCheckpointsRequest()).checkpoints
            return [each.reason for each in listed]
        eventually(lambda: "interval" in reasons())

    def test_a_damaged_one_is_named_and_nothing_changes(self):
        server = self.server("--keep_checkpoints=100").start()
        self.populate(server)
        good = self.save(server)
        for how in self.DAMAGES:
            with self.subTest(how):
                self.change(server)
                newest = self.save(server)
                damaged = self.damage(server, newest, how)
                self.change(server)
                before = everything(server.stub)
                with refused(self, grpc.StatusCode.DATA_LOSS, message=damaged.name):
                    server.stub.LoadCheckpoint(
                        rpc.LoadCheckpointRequest(checkpoint_id=newest.id))
                self.assertEqual(everything(server.stub), before)

                loaded = server.stub.LoadCheckpoint(rpc.LoadCheckpointRequest())
                self.assertEqual(loaded.checkpoint.id, good.id)
                self.assertEqual(loaded.damaged[0].id, newest.id)
                self.assertIn(damaged.name, loaded.damaged[0].problem)
                self.assertFalse(loaded.damaged[0].sound)
                shutil.rmtree(server.checkpoint_directory() / newest.id)

    def test_the_list_tells_what_can_be_seen_without_reading_it_all(self):
        server = self.server("--keep_checkpoints=100").start()
        self.populate(server)
        for how in ("a file cut", "a file lost", "the manifest cut", "the manifest lost"):
            with self.subTest(how):
                newest = self.save(server)
                self.damage(server, newest, how)
                listed = server.stub.ListCheckpoints(rpc.ListCheckpointsRequest()).checkpoints[0]
                self.assertEqual(listed.id, newest.id)
                self.assertFalse(listed.sound)
                self.assertTrue(listed.problem)

    def test_a_start_without_the_store_takes_the_newest_sound_one(self):
        for how in self.DAMAGES:
            with self.subTest(how):
                server = self.server().start()
                before = self.populate(server)
                self.save(server)
                self.change(server)
                newest = self.save(server)
                self.damage(server, newest, how)
                server.kill()
                self.drop_store(server)
                server.start()
                self.assertEqual(everything(server.stub), before)
                self.assertIn(newest.id, server.log())
                server.close()

    def test_what_a_torn_save_left_does_no_harm(self):
        server = self.server().start()
        before = self.populate(server)
        checkpoint = self.save(server)
        server.kill()
        directory = server.checkpoint_directory()
        torn = directory / f".{int(checkpoint.id.split('-')[0]) + 1:08d}-manual.tmp"
        shutil.copytree(directory / checkpoint.id, torn)
        (torn / "manifest.json").unlink()
        (directory / "notes.txt").write_text("not a checkpoint")
        server.start()
        self.assertEqual(everything(server.stub), before)
        listed = server.stub.ListCheckpoints(rpc.ListCheckpointsRequest()).checkpoints
        self.assertEqual([each.id for each in listed if each.sound], [checkpoint.id])

    def test_a_damaged_store_is_told_and_never_taken_for_an_empty_one(self):
        server = self.server().start()
        self.populate(server)
        self.save(server)
        server.kill()
        stores = [path for path in server.state_dir.rglob("*")
                  if path.is_file() and path.read_bytes()[:15] == b"SQLite format 3"]
        self.assertTrue(stores)
        for store in stores:
            store.write_bytes(os.urandom(20_000))
            for suffix in ("-wal", "-shm"):
                pathlib.Path(f"{store}{suffix}").unlink(missing_ok=True)
        done = run_normd("--listen=127.0.0.1:0", f"--state_dir={server.state_dir}")
        self.assertGreater(done.returncode, 0, done.stdout)
        self.assertIn(stores[0].name, done.stdout)

    def test_a_repeated_save_is_made_once(self):
        server = self.server().start()
        self.populate(server)
        request = rpc.SaveCheckpointRequest(request_id=request_id())
        first = server.stub.SaveCheckpoint(request)
        second = server.stub.SaveCheckpoint(request)
        self.assertFalse(first.replayed)
        self.assertTrue(second.replayed)
        self.assertEqual(first.checkpoint.id, second.checkpoint.id)


class Start(LifecycleCase):
    """Flags, their environment twins, and starts that must fail."""

    def state_flag(self):
        directory = tempfile.mkdtemp(prefix="normd-test-")
        self.addCleanup(shutil.rmtree, directory, True)
        return f"--state_dir={directory}/state"

    def fails(self, *flags, saying, env=None, **options):
        done = run_normd(*flags, env=env, **options)
        self.assertIn(done.returncode, (1, 2), f"{flags}: {done.stdout}")
        for part in [saying] if isinstance(saying, str) else saying:
            self.assertIn(part, done.stdout)
        return done

    def test_help_tells_every_flag(self):
        done = run_normd("--help")
        self.assertEqual(done.returncode, 0, done.stdout)
        for flag in ("listen", "port_file", "state_dir", "backend", "cuda_devices",
                     "device_memory_budget", "cuda_ipc", "threads", "deterministic",
                     "durability", "checkpoint_interval", "keep_checkpoints", "max_message_bytes",
                     "max_instances", "max_features", "admission_queue_timeout", "memory_budget",
                     "context_budget",
                     "context_ttl", "drain_timeout", "log_level", "log_format"):
            self.assertIn(f"--{flag}", done.stdout)

    def test_a_bad_flag_is_named(self):
        for flag in ("--listen=nonsense", "--listen=127.0.0.1:99999", "--listen=", "--backend=tpu",
                     "--cuda_devices=-1", "--cuda_devices=0,0", "--cuda_devices=first",
                     "--device_memory_budget=-1", "--cuda_ipc=maybe", "--cuda_ipc=on",
                     "--threads=-1", "--threads=many", "--durability=sometimes",
                     "--checkpoint_interval=-1s", "--checkpoint_interval=soon",
                     "--keep_checkpoints=0", "--keep_checkpoints=-3", "--max_message_bytes=0",
                     "--max_message_bytes=-1", "--max_message_bytes=lots", "--max_instances=0",
                     "--max_features=0", "--memory_budget=-1", "--context_budget=-1",
                     "--admission_queue_timeout=-1s", "--admission_queue_timeout=soon",
                     "--context_ttl=-1s", "--drain_timeout=-1s", "--log_level=loud",
                     "--log_format=xml", "--state_dir="):
            with self.subTest(flag):
                self.fails("--listen=127.0.0.1:0", self.state_flag(), flag,
                           saying=flag.split("=")[0].lstrip("-"))

    # CUDA_VISIBLE_DEVICES hides the GPUs of a machine that has some.
    def test_cuda_without_a_device_says_why(self):
        self.fails("--listen=127.0.0.1:0", self.state_flag(), "--backend=cuda",
                   env={"CUDA_VISIBLE_DEVICES": ""}, saying=("--backend=cuda", "CUDA", "--backend=cpu"))

    def test_auto_without_a_device_computes_on_the_cpu_and_says_why(self):
        server = self.server("--backend=auto")
        server.env = {"CUDA_VISIBLE_DEVICES": ""}
        server.start()
        info = server.stub.GetServerInfo(rpc.GetServerInfoRequest())
        self.assertEqual(info.backend, "cpu")
        self.assertIn("CUDA", info.backend_reason)
        server.stop()

    def test_unknown_flags_and_arguments_are_refused(self):
        self.fails("--no_such_flag=1", saying="no_such_flag")
        self.fails("--listen=127.0.0.1:0", self.state_flag(), "serve", saying="serve")

    def test_every_flag_has_its_twin_in_the_environment(self):
        server = self.server()
        server.env = {
            "NORMD_LISTEN": "127.0.0.1:0", "NORMD_PORT_FILE": str(server.port_file),
            "NORMD_STATE_DIR": str(server.state_dir), "NORMD_MAX_FEATURES": "77",
            "NORMD_MAX_MESSAGE_BYTES": "1000000", "NORMD_CONTEXT_TTL": "45s",
            "NORMD_DURABILITY": "update", "NORMD_LOG_FORMAT": "json", "NORMD_BACKEND": "cpu",
            "NORMD_DETERMINISTIC": "true",
        }
        server.command = lambda: [NORMD]
        server.start()
        info = server.stub.GetServerInfo(rpc.GetServerInfoRequest())
        self.assertEqual(info.limits.max_features, 77)
        self.assertEqual(info.limits.max_message_bytes, 1000000)
        self.assertEqual(info.limits.context_ttl_ms, 45000)
        self.assertEqual(info.durability, "update")
        server.stop()

    def test_a_flag_beats_its_twin(self):
        server = self.server("--max_features=55", env={"NORMD_MAX_FEATURES": "77"}).start()
        info = server.stub.GetServerInfo(rpc.GetServerInfoRequest())
        self.assertEqual(info.limits.max_features, 55)

    def test_a_bad_twin_is_named(self):
        self.fails("--listen=127.0.0.1:0", self.state_flag(), env={"NORMD_THREADS": "many"},
                   saying="NORMD_THREADS")

    def test_a_second_server_on_the_same_state_is_refused(self):
        server = self.server().start()
        Layer.create(server.stub, "bn", 3)
        done = self.fails("--listen=127.0.0.1:0", f"--state_dir={server.state_dir}",
                          saying=str(server.state_dir))
        self.assertRegex(done.stdout, "in use|another normd|locked")
        self.assertEqual(Layer(server.stub, "bn").info().version, 1)

    def test_a_taken_port_is_told(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            self.fails(f"--listen={address}", self.state_flag(), saying=address)

    def test_a_state_directory_that_is_a_file_is_told(self):
        with tempfile.NamedTemporaryFile() as file:
            self.fails("--listen=127.0.0.1:0", f"--state_dir={file.name}", saying=file.name)

    def test_a_read_only_state_directory_is_told(self):
        with tempfile.TemporaryDirectory() as directory:
            os.chmod(directory, 0o755)
            options = {}
            if os.geteuid() == 0:  # root may write anywhere: run as nobody
                binary = shutil.copy(NORMD, directory)
                options = dict(binary=binary, user=65534, group=65534, extra_groups=[], cwd="/")
            else:
                os.chmod(directory, 0o555)
            for state_dir in (directory, f"{directory}/state"):
                self.fails("--listen=127.0.0.1:0", f"--state_dir={state_dir}", saying=state_dir,
                           **options)

    def test_unix_sockets_and_several_addresses(self):
        server = self.server()
        path = server.directory / "socket"
        server.listen = f"127.0.0.1:0,unix:{path}"
        for _ in range(2):  # the second start finds the socket that a kill left
            server.start()
            self.assertEqual(len(server.port_file.read_text().split()), 2)
            with grpc.insecure_channel(f"unix:{path}") as channel:
                stub = norm_service_pb2_grpc.NormServiceStub(channel)
                self.assertTrue(stub.GetServerInfo(rpc.GetServerInfoRequest(), timeout=10).version)
            server.kill()

    def test_json_logs_are_json_and_debug_tells_each_request(self):
        server = self.server("--log_format=json", "--log_level=debug").start()
        Layer.create(server.stub, "bn", 3)
        with refused(self, grpc.StatusCode.NOT_FOUND):
            Layer(server.stub, "nobody").info()
        with refused(self, grpc.StatusCode.INVALID_ARGUMENT):
            Layer(server.stub, 'a "quoted"\nname').info()
        server.stop()
        lines = [json.loads(line) for line in server.log_file.read_text().splitlines()]
        self.assertTrue(lines)
        text = json.dumps(lines)
        for part in ("CreateInstance", "GetInstance", "NOT_FOUND"):
            self.assertIn(part, text)

    def test_text_logs_say_where_it_listens(self):
        server = self.server().start()
        self.assertIn(server.address, server.log())

    def test_deterministic_and_threads_start(self):
        for flags in (("--deterministic", "--threads=1"), ("--threads=3",), ("--backend=auto",)):
            server = self.server(*flags).start()
            self.assertEqual(Layer.create(server.stub, "bn", 3)(torch.randn(2, 3, 4, 4)).shape[1], 3)
            server.close()


if __name__ == "__main__":
    unittest.main()
