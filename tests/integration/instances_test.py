"""Instances from outside: made, listed, switched, removed; and what the server tells of itself."""

import unittest
import uuid

import grpc
import health_pb2
import health_pb2_grpc
import reflection_pb2
import reflection_pb2_grpc
import torch
from google.protobuf import descriptor_pb2
from harness.errors import refused
from harness.layer import EVAL, TRAIN, Layer, batch_norm_2d, request_id
from harness.server import ServerTestCase, eventually
from normd.v1 import instance_pb2, norm_service_pb2 as rpc, tensor_pb2


class Lifecycle(ServerTestCase):
    def create(self, name, **fields):
        return self.stub.CreateInstance(rpc.CreateInstanceRequest(
            name=name, config=batch_norm_2d(4), **fields))

    def test_defaults_are_pytorchs(self):
        made = self.stub.CreateInstance(rpc.CreateInstanceRequest(
            name="defaults", config=instance_pb2.InstanceConfig(
                batch_norm_2d=instance_pb2.BatchNorm2d(num_features=4))))
        self.assertEqual((made.version, made.replayed), (1, False))
        instance = made.instance
        uuid.UUID(instance.uid)
        self.assertEqual(instance.name, "defaults")
        self.assertEqual(instance.mode, TRAIN)
        self.assertEqual(instance.num_batches_tracked, 0)
        self.assertFalse(instance.has_gradients)
        self.assertEqual(instance.optimizer, "")
        self.assertEqual(instance.state_bytes, 4 * 4 * 4 + 8)
        layer = instance.config.batch_norm_2d
        self.assertEqual(layer.eps, 1e-5)
        self.assertEqual(layer.momentum, 0.1)
        self.assertTrue(layer.affine and layer.track_running_stats)
        self.assertEqual(instance.config.state_dtype, tensor_pb2.DATA_TYPE_FLOAT32)
        for key, value in torch.nn.BatchNorm2d(4).state_dict().items():
            self.assertTrue(torch.equal(Layer(self.stub, "defaults").state_dict()[key], value), key)

    def test_get_answers_what_create_did(self):
        made = self.create("get", mode=EVAL)
        got = self.stub.GetInstance(rpc.GetInstanceRequest(name="get"))
        self.assertEqual(got.instance, made.instance)
        self.assertEqual(got.instance.mode, EVAL)
        self.assertEqual(got.version, 1)

    def test_every_legal_name_is_taken(self):
        for name in ("a", "A-b_c.d", "net/layer1.0/bn", "...", "a/...", "n" * 255, "-", "0"):
            with self.subTest(name):
                self.create(name)
                self.assertEqual(Layer(self.stub, name).info().name, name)
                Layer(self.stub, name).delete()

    def test_pages_hold_every_name_once_and_in_order(self):
        names = sorted(f"page/{index}" for index in range(23))
        for name in reversed(names):
            self.create(name)
        for size in (1, 5, 23, 1000):
            seen, token, pages = [], "", 0
            while True:
                page = self.stub.ListInstances(rpc.ListInstancesRequest(
                    name_prefix="page/", page_size=size, page_token=token))
                self.assertLessEqual(len(page.instances), size)
                seen += [instance.name for instance in page.instances]
                token = page.next_page_token
                pages += 1
                if not token:
                    break
            self.assertEqual(seen, names)
            self.assertEqual(pages, -(-23 // size))
        everything = self.stub.ListInstances(rpc.ListInstancesRequest())
        self.assertEqual(everything.total_count, len(everything.instances))
        self.assertGreaterEqual(everything.total_count, 23)

    def test_a_page_token_lives_through_deletions(self):
        for index in range(4):
            self.create(f"token/{index}")
        page = self.stub.ListInstances(rpc.ListInstancesRequest(name_prefix="token/", page_size=2))
        Layer(self.stub, "token/1").delete()
        Layer(self.stub, "token/2").delete()
        page = self.stub.ListInstances(rpc.ListInstancesRequest(
            name_prefix="token/", page_size=2, page_token=page.next_page_token))
        self.assertEqual([instance.name for instance in page.instances], ["token/3"])

    def test_a_deleted_name_is_free_for_another_instance(self):
        first = self.create("again").instance
        layer = Layer(self.stub, "again")
        layer.forward(torch.randn(2, 4, 3, 3))
        self.assertEqual(layer.delete().version, 2)
        with refused(self, grpc.StatusCode.NOT_FOUND, message="again"):
            layer.info()
        second = self.create("again").instance
        self.assertNotEqual(first.uid, second.uid)
        self.assertEqual(second.version, 1)
        self.assertEqual(layer.info().num_batches_tracked, 0)

    def test_each_change_raises_the_version_by_one(self):
        self.create("versions")
        layer = Layer(self.stub, "versions")
        x = torch.randn(2, 4, 3, 3)
        self.assertEqual(layer.eval().version, 2)
        self.assertEqual(layer.eval().version, 3)  # a change even where it is eval already
        self.assertEqual(layer.forward(x).version, 3)  # eval mode changes nothing
        self.assertEqual(layer.train().version, 4)
        self.assertEqual(layer.forward(x).version, 5)
        self.assertEqual(layer.backward(x, x=x).version, 5)
        self.assertEqual(layer.backward(x, x=x, accumulate=True).version, 6)
        self.assertTrue(layer.info().has_gradients)
        self.assertEqual(layer.zero_grad().version, 7)
        self.assertFalse(layer.info().has_gradients)
        self.assertEqual(layer.load_state_dict(layer.state_dict()).version, 8)
        self.assertEqual(self.stub.ResetRunningStats(
            rpc.ResetRunningStatsRequest(name="versions")).version, 9)
        self.assertEqual(self.stub.ResetParameters(
            rpc.ResetParametersRequest(name="versions")).version, 10)
        got = layer.get_state()
        self.assertEqual((got.version, got.instance.version), (10, 10))

    def test_the_right_expected_version_lets_the_change_through(self):
        self.create("expected")
        answer = self.stub.Train(rpc.TrainRequest(name="expected", expected_version=1))
        self.assertEqual(answer.version, 2)

    def test_backward_without_a_forward_takes_the_instances_mode(self):
        self.create("stateless")
        layer = Layer(self.stub, "stateless")
        x, grad = torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3)
        in_train = layer.backward(grad, x=x).grad_input.data
        self.assertEqual(layer.backward(grad, x=x, mode=TRAIN).grad_input.data, in_train)
        layer.eval()
        in_eval = layer.backward(grad, x=x).grad_input.data
        self.assertNotEqual(in_eval, in_train)
        self.assertEqual(layer.backward(grad, x=x, mode=EVAL).grad_input.data, in_eval)

    def test_a_repeated_create_or_delete_is_answered_alike(self):
        again = request_id()
        first = self.create("replayed", request_id=again)
        second = self.create("replayed", request_id=again)
        self.assertTrue(second.replayed)
        self.assertEqual(second.instance.uid, first.instance.uid)
        with refused(self, grpc.StatusCode.ALREADY_EXISTS, message="replayed"):
            self.create("replayed", request_id=request_id())
        again = request_id()
        delete = rpc.DeleteInstanceRequest(name="replayed", request_id=again)
        self.assertEqual(self.stub.DeleteInstance(delete).version, 1)
        answer = self.stub.DeleteInstance(delete)
        self.assertTrue(answer.replayed)
        self.assertEqual(answer.version, 1)
        with refused(self, grpc.StatusCode.NOT_FOUND):
            self.stub.DeleteInstance(rpc.DeleteInstanceRequest(name="replayed"))


class ServerInfo(ServerTestCase):
    FLAGS = ("--max_message_bytes=12345678", "--max_instances=321", "--max_features=777",
             "--memory_budget=123456789", "--context_budget=23456789", "--context_ttl=90s",
             "--backend=cpu", "--threads=2", "--durability=none")

    def test_it_tells_version_devices_and_limits(self):
        Layer.create(self.stub, "one", 3)
        info = self.stub.GetServerInfo(rpc.GetServerInfoRequest())
        self.assertRegex(info.version, r"^\d+\.\d+\.\d+$")
        self.assertEqual(info.backend, "cpu")
        self.assertEqual(info.backend_reason, "")  # as asked
        self.assertEqual(len(info.devices), 1)
        self.assertTrue(info.devices[0].name)
        self.assertEqual(info.devices[0].parallelism, 2)
        self.assertTrue(info.devices[0].healthy)
        self.assertEqual(info.instance_count, 1)
        self.assertEqual(info.durability, "none")
        limits = info.limits
        self.assertEqual((limits.max_message_bytes, limits.max_instances, limits.max_features,
                          limits.memory_budget, limits.context_budget, limits.context_ttl_ms),
                         (12345678, 321, 777, 123456789, 23456789, 90_000))

    def test_memory_of_contexts_is_counted_and_given_back(self):
        layer = Layer.create(self.stub, "memory", 3)
        used = lambda: self.stub.GetServerInfo(rpc.GetServerInfoRequest()).memory_in_use
        before = used()
        x = torch.randn(4, 3, 64, 64)
        context = layer.forward(x, save=True).context_id
        self.assertGreaterEqual(used() - before, x.numel() * 4)
        layer.backward(x, context)
        # An answer's memory is its own until gRPC has sent it.
        eventually(lambda: used() == before)


class StandardServices(ServerTestCase):
    def test_health_knows_the_server_and_the_service(self):
        health = health_pb2_grpc.HealthStub(self.server.channel)
        for service in ("", "normd.v1.NormService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            self.assertEqual(answer.status, health_pb2.HealthCheckResponse.SERVING, service)
        with refused(self, grpc.StatusCode.NOT_FOUND):
            health.Check(health_pb2.HealthCheckRequest(service="normd.v2.NormService"))

    def reflect(self, **question):
        stub = reflection_pb2_grpc.ServerReflectionStub(self.server.channel)
        return next(iter(stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(**question)]), timeout=10)))

    def test_reflection_lists_the_services_and_their_descriptors(self):
        names = {s.name for s in self.reflect(list_services="").list_services_response.service}
        self.assertLessEqual({"normd.v1.NormService", "grpc.health.v1.Health"}, names)
        answer = self.reflect(file_containing_symbol="normd.v1.NormService")
        files = [descriptor_pb2.FileDescriptorProto.FromString(each)
                 for each in answer.file_descriptor_response.file_descriptor_proto]
        file = next(each for each in files if each.name == "normd/v1/norm_service.proto")
        methods = [method.name for method in file.service[0].method]
        self.assertEqual(len(methods), 24)
        self.assertIn("ForwardStream", methods)


if __name__ == "__main__":
    unittest.main()
