"""Who gets in, who may do what, and what a connection may cost: against real servers."""

import hashlib
import json
import os
import pathlib
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import uuid

import grpc
import health_pb2
import health_pb2_grpc
import numpy
from google.protobuf import message_factory
from normd.v1 import instance_pb2, norm_service_pb2 as pb, norm_service_pb2_grpc, tensor_pb2

from harness.certificates import Authority
from harness.errors import error_detail, refused
from harness.server import Server, eventually, run_normd

# The build's stubs and the client's Python package are two parts of one name.
import normd
normd.__path__.append(
    str(pathlib.Path(__file__).resolve().parents[2] / "client" / "python" / "normd"))
from normd.client import Client
from normd.errors import NormdError

NORMCTL = os.environ.get("NORMCTL_BIN", "build/release/bin/normctl")
SERVICE = pb.DESCRIPTOR.services_by_name["NormService"]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"

# What each RPC asks for: the role, and on what. Said again here, and not read from the server's
# table, so that a change of either is seen.
ROLES = {
    "GetServerInfo": ("reader", "server"),
    "RegisterSharedMemory": ("reader", "server"),
    "UnregisterSharedMemory": ("reader", "server"),
    "GetSharedMemoryStatus": ("reader", "server"),
    "ListInstances": ("reader", "server"),
    "GetInstance": ("reader", "name"),
    "GetState": ("reader", "name"),
    "FoldConvolution": ("reader", "name"),
    "Forward": ("reader", "name"),
    "ForwardStream": ("reader", "name"),
    "Backward": ("user", "name"),
    "BackwardStream": ("user", "name"),
    "ZeroGrad": ("user", "name"),
    "Step": ("user", "name"),
    "Train": ("user", "name"),
    "Eval": ("user", "name"),
    "CreateInstance": ("admin", "name"),
    "DeleteInstance": ("admin", "name"),
    "SetState": ("admin", "name"),
    "ResetRunningStats": ("admin", "name"),
    "ResetParameters": ("admin", "name"),
    "SaveCheckpoint": ("admin", "all"),
    "LoadCheckpoint": ("admin", "all"),
    "ListCheckpoints": ("admin", "all"),
}
SMALLER = {"user": ("reader",), "admin": ("reader", "user"), "reader": ()}


def new_token():
    return "normd_" + secrets.token_urlsafe(32)


def line(token, name, role, prefixes):
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()} {name} {role} {prefixes}\n"


def bearer(token):
    return (("authorization", f"Bearer {token}"),)


def tensor():
    return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2, 3, 2, 2],
                             data=numpy.arange(24, dtype="<f4").tobytes())


def config():
    return instance_pb2.InstanceConfig(batch_norm_2d=instance_pb2.BatchNorm2d(num_features=3))


def call(channel, method, name, metadata=(), request=None):
    """The answer of any RPC of the service, unary or stream, about the instance `name`."""
    factory = message_factory.MessageFactory()
    types = [factory.GetPrototype(kind) for kind in (method.input_type, method.output_type)]
    path = f"/{SERVICE.full_name}/{method.name}"
    arguments = {"request_serializer": types[0].SerializeToString,
                 "response_deserializer": types[1].FromString}
    if request is None:
        request = types[0]()
        target = request.header if method.name.endswith("Stream") else request
        if hasattr(target, "name"):
            target.name = name
    if method.name.endswith("Stream"):
        stream = channel.stream_stream(path, **arguments)
        return list(stream(iter([request]), metadata=metadata, timeout=20))
    return channel.unary_unary(path, **arguments)(request, metadata=metadata, timeout=20)


def code_of(*arguments, **keywords):
    try:
        call(*arguments, **keywords)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


class WithFiles(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = pathlib.Path(tempfile.mkdtemp(prefix="normd-security-"))
        cls.addClassCleanup(shutil.rmtree, cls.directory, ignore_errors=True)

    @classmethod
    def serve(cls, *flags, **keywords):
        server = Server(*flags, **keywords)
        cls.addClassCleanup(server.close)
        return server.start()


class EveryRpc(WithFiles):
    """Each method of the service descriptor, with all the credentials that must not do."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.tokens = {who: new_token() for who in (
            "root", "a-reader", "a-user", "a-admin", "b-admin", "ab-reader")}
        lines = [line(cls.tokens["root"], "root", "admin", "*"),
                 line(cls.tokens["ab-reader"], "ab-reader", "reader", "a/,b/2")]
        for who in ("a-reader", "a-user", "a-admin", "b-admin"):
            prefix, role = who.split("-")
            lines.append(line(cls.tokens[who], who, role, prefix + "/"))
        cls.auth_file = cls.directory / "auth"
        cls.auth_file.write_text("# test\n\n" + "".join(lines))
        cls.audit = cls.directory / "audit"
        cls.server = cls.serve(f"--auth_file={cls.auth_file}", f"--audit_log={cls.audit}")
        cls.channel, cls.stub = cls.server.channel, cls.server.stub
        for name in ("a/x", "b/1", "b/2", "b/23", "c"):
            cls.stub.CreateInstance(pb.CreateInstanceRequest(name=name, config=config()),
                                    metadata=cls.who("root"))

    @classmethod
    def who(cls, name):
        return bearer(cls.tokens[name])

    def test_every_method_is_in_this_tests_table(self):
        self.assertEqual(set(ROLES), {method.name for method in SERVICE.methods})

    def each(self, metadata, name="a/x"):
        """(method, code) of every RPC with such credentials."""
        for method in SERVICE.methods:
            with self.subTest(method=method.name):
                yield method.name, code_of(self.channel, method, name, metadata)

    def test_without_or_with_wrong_credentials_every_call_is_unauthenticated(self):
        token = self.tokens["root"]
        for metadata in (
                (), bearer(new_token()), bearer(""), bearer(token[:-1]), bearer(token + "x"),
                bearer(token.upper()), bearer("x" * 4000),
                bearer(hashlib.sha256(token.encode()).hexdigest()),
                (("authorization", token),), (("authorization", f"Basic {token}"),),
                bearer(token) + bearer(token), (("token", token),)):
            for method, code in self.each(metadata):
                self.assertEqual(code, grpc.StatusCode.UNAUTHENTICATED, (method, metadata))

    def test_a_role_too_small_is_refused(self):
        for who in ("a-reader", "a-user"):
            for method, code in self.each(self.who(who)):
                if who[2:] in SMALLER[ROLES[method][0]]:
                    self.assertEqual(code, grpc.StatusCode.PERMISSION_DENIED, (who, method))

    def test_a_name_outside_of_the_prefixes_is_refused_whether_it_exists_or_not(self):
        for name in ("a/x", "a/none", "a", "b", "", "bb/x", "../b/x"):
            for method, code in self.each(self.who("b-admin"), name):
                if ROLES[method][1] != "server":
                    self.assertEqual(code, grpc.StatusCode.PERMISSION_DENIED, (method, name))

    def test_the_right_role_on_the_right_name_is_let_in(self):
        closed = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
        for who in ("root", "a-admin", "a-user", "a-reader"):
            role = "admin" if who == "root" else who[2:]
            for method, code in self.each(self.who(who), "a/none"):
                if role in SMALLER[ROLES[method][0]]:
                    continue
                if ROLES[method][1] == "all" and who != "root":
                    continue
                self.assertNotIn(code, closed, (who, method))

    def test_a_refusal_names_field_value_and_role(self):
        with refused(self, grpc.StatusCode.PERMISSION_DENIED, field="name",
                     message="role admin") as refusal:
            self.stub.DeleteInstance(pb.DeleteInstanceRequest(name="b/1"),
                                     metadata=self.who("a-admin"))
        self.assertEqual(refusal.detail.value, "b/1")

    def forward(self, who, **fields):
        return self.stub.Forward(pb.ForwardRequest(name="a/x", input=tensor(), **fields),
                                 metadata=self.who(who))

    def test_a_reader_forwards_in_eval_mode_and_changes_nothing(self):
        answer = self.forward("a-reader", mode=instance_pb2.MODE_EVAL)
        self.assertEqual(len(answer.output.data), 96)
        before = answer.version
        train = {"mode": instance_pb2.MODE_TRAIN}
        for fields in (train, {}, {"mode": instance_pb2.MODE_EVAL, "save_for_backward": True},
                       {"request_id": str(uuid.uuid4()), **train}):
            with refused(self, grpc.StatusCode.PERMISSION_DENIED, field="name"):
                self.forward("a-reader", **fields)
            header = pb.ForwardRequest(name="a/x", input=tensor(), **fields)
            header.input.data = b""
            method = SERVICE.methods_by_name["ForwardStream"]

            def messages(header=header):
                yield pb.ForwardStreamRequest(header=header)
                yield pb.ForwardStreamRequest(chunk=tensor().data)

            with refused(self, grpc.StatusCode.PERMISSION_DENIED, field="name"):
                list(self.stub.ForwardStream(messages(), metadata=self.who("a-reader")))
            self.assertEqual(method.name, "ForwardStream")
        self.assertEqual(self.forward("a-reader", mode=instance_pb2.MODE_EVAL).version, before)
        self.assertEqual(self.forward("a-user", **train).version, before + 1)

    def test_a_layer_without_statistics_is_forwarded_by_readers_in_either_mode(self):
        layer = instance_pb2.InstanceConfig(
            group_norm=instance_pb2.GroupNorm(num_groups=1, num_channels=3))
        self.stub.CreateInstance(pb.CreateInstanceRequest(name="a/group", config=layer),
                                 metadata=self.who("a-admin"))
        self.stub.Forward(pb.ForwardRequest(name="a/group", input=tensor()),
                          metadata=self.who("a-reader"))
        self.stub.DeleteInstance(pb.DeleteInstanceRequest(name="a/group"),
                                 metadata=self.who("a-admin"))

    def names(self, who, page_size=0, prefix=""):
        names, token = [], ""
        while True:
            page = self.stub.ListInstances(
                pb.ListInstancesRequest(page_size=page_size, page_token=token, name_prefix=prefix),
                metadata=self.who(who))
            names += [instance.name for instance in page.instances]
            token = page.next_page_token
            if not token:
                return names

    def test_a_list_shows_only_what_the_caller_may_see(self):
        for page_size in (0, 1, 2, 3):
            self.assertEqual(self.names("root", page_size), ["a/x", "b/1", "b/2", "b/23", "c"])
            self.assertEqual(self.names("ab-reader", page_size), ["a/x", "b/2", "b/23"])
            self.assertEqual(self.names("a-user", page_size), ["a/x"])
            self.assertEqual(self.names("ab-reader", page_size, "b"), ["b/2", "b/23"])
            self.assertEqual(self.names("ab-reader", page_size, "b/23"), ["b/23"])
            self.assertEqual(self.names("ab-reader", page_size, "c"), [])
        page = self.stub.ListInstances(pb.ListInstancesRequest(), metadata=self.who("ab-reader"))
        self.assertEqual(page.total_count, 0)

    def test_an_admin_of_a_prefix_loads_its_own_names_from_a_checkpoint(self):
        self.stub.SaveCheckpoint(pb.SaveCheckpointRequest(), metadata=self.who("root"))
        loaded = self.stub.LoadCheckpoint(pb.LoadCheckpointRequest(names=["b/1"]),
                                          metadata=self.who("b-admin"))
        self.assertEqual(loaded.instance_count, 1)
        for names in ([], ["a/x"], ["b/1", "a/x"]):
            with refused(self, grpc.StatusCode.PERMISSION_DENIED, field="names"):
                self.stub.LoadCheckpoint(pb.LoadCheckpointRequest(names=names),
                                         metadata=self.who("b-admin"))

    def test_what_is_damaged_elsewhere_is_not_named_to_an_admin_of_a_prefix(self):
        saved = self.stub.SaveCheckpoint(pb.SaveCheckpointRequest(), metadata=self.who("root"))
        damaged = saved.checkpoint.id
        folder = self.server.checkpoint_directory() / damaged
        file = next(folder.rglob("a%2Fx.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        self.addCleanup(shutil.rmtree, folder)

        def load(who, id=damaged):
            return self.stub.LoadCheckpoint(
                pb.LoadCheckpointRequest(checkpoint_id=id, names=["b/1"]), metadata=self.who(who))
        with refused(self, grpc.StatusCode.DATA_LOSS, message=file.name):
            load("root")
        with refused(self, grpc.StatusCode.DATA_LOSS, "checkpoint_id",
                     message="the server's log says where") as refusal:
            load("b-admin")
        self.assertNotIn("safetensors", refusal.error.details() + str(refusal.detail))
        self.assertIn(file.name, self.server.log())

    def test_health_is_open_and_reflection_is_not_there(self):
        health = health_pb2_grpc.HealthStub(self.channel)
        self.assertEqual(health.Check(health_pb2.HealthCheckRequest()).status,
                         health_pb2.HealthCheckResponse.SERVING)
        for version in ("v1", "v1alpha"):
            path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
            for metadata in ((), self.who("root")):
                with refused(self, grpc.StatusCode.UNIMPLEMENTED):
                    list(self.channel.stream_stream(path)(iter([b""]), metadata=metadata))

    def test_the_audit_log_tells_changes_and_refusals(self):
        def lines():
            return [json.loads(text) for text in self.audit.read_text().splitlines()]

        def last_of(action):
            known = len(lines())
            action()
            return lines()[known:]

        ids = [str(uuid.uuid4()) for _ in range(2)]
        step = pb.ZeroGradRequest(name="a/x", request_id=ids[0])
        entries = last_of(lambda: [self.stub.ZeroGrad(step, metadata=self.who("a-user"))
                                   for _ in range(2)])
        for entry, replayed in zip(entries, (False, True), strict=True):
            self.assertEqual([entry[key] for key in ("who", "method", "instance", "request_id",
                                                     "outcome", "replayed")],
                             ["a-user", "ZeroGrad", "a/x", ids[0], "OK", replayed])
            self.assertTrue(entry["peer"].startswith("ipv4:127.0.0.1:"), entry)
            self.assertGreater(entry["version"], 0)
        train, = last_of(lambda: self.forward("a-user", mode=instance_pb2.MODE_TRAIN,
                                              request_id=ids[1]))
        self.assertEqual((train["method"], train["request_id"], train["outcome"]),
                         ("Forward", ids[1], "OK"))
        self.assertEqual(last_of(lambda: self.forward("a-user", mode=instance_pb2.MODE_EVAL)), [])

        def refuse(metadata):
            with self.assertRaises(grpc.RpcError):
                self.stub.GetState(pb.GetStateRequest(name="b/1"), metadata=metadata)

        denied, = last_of(lambda: refuse(self.who("a-user")))
        self.assertEqual((denied["who"], denied["method"], denied["instance"], denied["outcome"]),
                         ("a-user", "GetState", "b/1", "PERMISSION_DENIED"))
        stranger, = last_of(lambda: refuse(()))
        self.assertEqual((stranger["who"], stranger["outcome"]), ("", "UNAUTHENTICATED"))
        self.assertEqual(self.audit.stat().st_mode & 0o777, 0o600)
        text = self.audit.read_text()
        self.assertFalse([token for token in self.tokens.values() if token in text])


class Reloaded(WithFiles):
    def test_tokens_come_and_go_with_the_file_and_an_unsound_one_changes_nothing(self):
        old, new = new_token(), new_token()
        auth_file = self.directory / "auth"
        auth_file.write_text(line(old, "old", "reader", "*"))
        server = self.serve(f"--auth_file={auth_file}")

        def known(token):
            try:
                server.stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=bearer(token))
            except grpc.RpcError as error:
                self.assertEqual(error.code(), grpc.StatusCode.UNAUTHENTICATED)
                return False
            return True

        self.assertEqual((known(old), known(new)), (True, False))
        replacement = self.directory / "auth.new"
        replacement.write_text(line(new, "new", "reader", "*"))
        replacement.rename(auth_file)
        eventually(lambda: (known(old), known(new)) == (False, True))
        auth_file.write_text("sha256:nonsense new reader *\n")
        eventually(lambda: (known(new), "stay in force" in server.log())[1])
        self.assertTrue(known(new))
        auth_file.unlink()
        time.sleep(1.2)
        self.assertTrue(known(new))
        auth_file.write_text(line(old, "old", "reader", "*"))
        eventually(lambda: (known(old), known(new)) == (True, False))

    def test_an_unsound_file_at_the_start_is_refused_with_its_line(self):
        token = new_token()
        for text, saying in (
                ("sha256:12 a reader *", "CREDENTIAL"), ("x a reader *", "CREDENTIAL"),
                (line(token, "a", "boss", "*"), "ROLE"), (line(token, "a", "user", ""), "words"),
                (line(token, "a", "user", "a,,b"), "NAMES"),
                (line(token, "a b", "user", "*"), "words"),
                (line(token, "a", "user", "*") + line(token, "b", "user", "*"), "NAME"),
                (None, "cannot read")):
            with self.subTest(text=text):
                path = self.directory / "unsound"
                if text is None:
                    path.unlink()
                else:
                    path.write_text("\n" + text)
                done = run_normd("--listen=127.0.0.1:0", f"--state_dir={self.directory / 's'}",
                                 f"--auth_file={path}")
                self.assertEqual(done.returncode, 1, done.stdout)
                self.assertIn(saying, done.stdout)
                self.assertIn(f"--auth_file={path}", done.stdout)


class Tls(WithFiles):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.root = Authority(cls.directory)
        cls.stranger = Authority(cls.directory, "stranger")
        cls.cert, cls.key = cls.root.issue("server", "normd")
        cls.token = new_token()
        cls.auth_file = cls.directory / "auth"
        cls.auth_file.write_text(
            line(cls.token, "trainer", "admin", "*") + "cn:ops ops admin *\n"
            "san:eval.example.org eval reader net/ # by its name in the network\n")
        cls.flags = [f"--tls_cert={cls.cert}", f"--tls_key={cls.key}",
                     f"--auth_file={cls.auth_file}"]

    def info(self, channel, token=None):
        stub = norm_service_pb2_grpc.NormServiceStub(channel)
        try:
            stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=10,
                               metadata=bearer(token) if token else ())
        except grpc.RpcError as error:
            return error.code()
        finally:
            channel.close()
        return grpc.StatusCode.OK

    def test_only_tls_reaches_the_server_and_only_by_those_who_believe_it(self):
        server = self.serve(*self.flags, credentials=self.root.credentials())
        self.assertEqual(self.info(server.connect(), self.token), grpc.StatusCode.OK)
        self.assertEqual(self.info(server.connect()), grpc.StatusCode.UNAUTHENTICATED)
        plain = grpc.insecure_channel(server.address)
        self.assertEqual(self.info(plain, self.token), grpc.StatusCode.UNAVAILABLE)
        self.assertEqual(self.info(server.connect(self.stranger.credentials()), self.token),
                         grpc.StatusCode.UNAVAILABLE)
        host, port = server.address.rsplit(":", 1)
        for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = context.maximum_version = version
            with socket.create_connection((host, port)) as raw, self.assertRaises(OSError):
                context.wrap_socket(raw)

    def test_the_clients_speak_it(self):
        server = self.serve(*self.flags, credentials=self.root.credentials())
        token_file = self.directory / "trainer.token"
        token_file.write_text(self.token + "\n")
        with Client(server.address, tls_ca=self.root.certificate, token_file=token_file) as client:
            client.create("net/python", 3)
            x = numpy.ones((2, 3, 2, 2), "f4")
            self.assertEqual(client.forward("net/python", x, stream=True).num_batches_tracked, 1)
            self.assertTrue(client.healthy())
        with Client(server.address, tls_ca=self.root.certificate) as client:
            with self.assertRaises(NormdError) as caught:
                client.get("net/python")
            self.assertEqual(caught.exception.code, grpc.StatusCode.UNAUTHENTICATED)

        def normctl(*arguments, **environment):
            return subprocess.run(
                [NORMCTL, f"--server={server.address}", *map(str, arguments)], text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False,
                env={**os.environ, **environment})

        files = [f"--tls_ca={self.root.certificate}", f"--token_file={token_file}"]
        done = normctl(*files, "describe", "net/python")
        self.assertEqual(done.returncode, 0, done.stdout)
        done = normctl("list", NORMD_CLIENT_TLS_CA=str(self.root.certificate),
                       NORMD_CLIENT_TOKEN_FILE=str(token_file))
        self.assertIn("net/python", done.stdout)
        done = normctl(files[0], "list")
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn("UNAUTHENTICATED", done.stdout)
        self.assertIn("--token_file", done.stdout)
        done = normctl(f"--token_file={self.directory / 'none'}", "list")
        self.assertEqual(done.returncode, 2, done.stdout)

    def test_a_token_of_normctl_is_let_in_once_its_line_is_there(self):
        token_file = self.directory / "made.token"
        done = subprocess.run(
            [NORMCTL, "token", "new", "--name=made", "--role=reader", "--prefix=net/",
             "--prefix=other/", f"--output={token_file}"], text=True, stdout=subprocess.PIPE,
            check=True)
        self.assertEqual(token_file.stat().st_mode & 0o777, 0o600)
        token = token_file.read_text().strip()
        self.assertEqual(done.stdout, line(token, "made", "reader", "net/,other/"))
        auth_file = self.directory / "auth.made"
        auth_file.write_text(done.stdout)
        server = self.serve(f"--auth_file={auth_file}")
        self.assertEqual(self.info(server.connect(), token), grpc.StatusCode.OK)

    def test_with_a_client_ca_only_its_clients_connect_and_their_names_have_roles(self):
        ops = self.root.issue("ops", "ops", "DNS:ops.example.org")
        evaluator = self.root.issue("eval", "whoever", "DNS:eval.example.org")
        unknown = self.root.issue("unknown", "unknown", "DNS:unknown.example.org")
        false = self.stranger.issue("false", "ops", "DNS:ops.example.org")
        server = self.serve(*self.flags, f"--tls_client_ca={self.root.certificate}",
                            credentials=self.root.credentials(*ops))
        self.assertEqual(self.info(server.connect()), grpc.StatusCode.OK)
        for credentials in (self.root.credentials(), self.root.credentials(*false)):
            self.assertEqual(self.info(server.connect(credentials), self.token),
                             grpc.StatusCode.UNAVAILABLE)
        self.assertEqual(self.info(server.connect(self.root.credentials(*unknown))),
                         grpc.StatusCode.UNAUTHENTICATED)
        # A token goes before the certificate, for better and for worse.
        self.assertEqual(self.info(server.connect(self.root.credentials(*unknown)), self.token),
                         grpc.StatusCode.OK)
        self.assertEqual(self.info(server.connect(), new_token()),
                         grpc.StatusCode.UNAUTHENTICATED)
        server.stub.CreateInstance(pb.CreateInstanceRequest(name="net/x", config=config()))
        reader = norm_service_pb2_grpc.NormServiceStub(
            server.connect(self.root.credentials(*evaluator)))
        reader.GetInstance(pb.GetInstanceRequest(name="net/x"))
        with refused(self, grpc.StatusCode.PERMISSION_DENIED):
            reader.DeleteInstance(pb.DeleteInstanceRequest(name="net/x"))
        with refused(self, grpc.StatusCode.PERMISSION_DENIED):
            reader.GetInstance(pb.GetInstanceRequest(name="other"))

    def test_new_certificates_come_into_force_under_calls_of_which_none_fails(self):
        cert, key = self.directory / "live.pem", self.directory / "live.key"
        shutil.copy(self.cert, cert)
        shutil.copy(self.key, key)
        server = self.serve(f"--tls_cert={cert}", f"--tls_key={key}",
                            credentials=self.root.credentials())
        host, port = server.address.rsplit(":", 1)
        stop, failures, calls = threading.Event(), [], [0, 0]

        def keep_calling(index):
            while not stop.is_set():
                try:
                    server.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=10)
                    calls[index] += 1
                except grpc.RpcError as error:
                    failures.append(error)

        threads = [threading.Thread(target=keep_calling, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        try:
            for number in range(3):
                new_cert, new_key = self.root.issue(f"next{number}", f"normd{number}")
                expected = ssl.PEM_cert_to_DER_cert(new_cert.read_text())
                new_key.rename(key)
                new_cert.rename(cert)

                def served():
                    try:
                        pem = ssl.get_server_certificate((host, int(port)))
                    except OSError:
                        return False
                    return ssl.PEM_cert_to_DER_cert(pem) == expected

                eventually(served)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        self.assertEqual(failures, [])
        self.assertGreater(min(calls), 100)
        self.assertEqual(self.info(server.connect()), grpc.StatusCode.OK)

    def test_unusable_files_are_refused_at_the_start(self):
        other = self.root.issue("other", "other")
        state = f"--state_dir={self.directory / 's'}"
        for flags, saying in (
                ((f"--tls_cert={self.cert}",), "--tls_key"),
                ((f"--tls_key={self.key}",), "--tls_cert"),
                ((f"--tls_client_ca={self.cert}",), "--tls_client_ca"),
                ((f"--tls_cert={self.cert}", f"--tls_key={other[1]}"), "--tls_key"),
                ((f"--tls_cert={self.key}", f"--tls_key={self.key}"), "--tls_cert"),
                ((f"--tls_cert={self.cert}", f"--tls_key={self.key}",
                  f"--tls_client_ca={self.key}"), "--tls_client_ca")):
            with self.subTest(flags=flags):
                done = run_normd("--listen=127.0.0.1:0", state, *flags)
                self.assertIn(done.returncode, (1, 2), done.stdout)
                self.assertIn(saying, done.stdout)


class OpenAddresses(WithFiles):
    def test_without_tls_and_credentials_only_this_machine_is_served(self):
        root = Authority(self.directory)
        cert, key = root.issue("server", "normd")
        auth_file = self.directory / "auth"
        auth_file.write_text(line(new_token(), "a", "reader", "*"))
        state = f"--state_dir={self.directory / 's'}"
        tls = (f"--tls_cert={cert}", f"--tls_key={key}")
        auth = (f"--auth_file={auth_file}",)
        for address in ("0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:0",
                        "127.0.0.1:0,0.0.0.0:0", "127.0.0.1.example.org:0"):
            for flags, saying in (((), "--tls_cert"), (tls, "--auth_file"), (auth, "--tls_cert")):
                with self.subTest(address=address, flags=flags):
                    done = run_normd(f"--listen={address}", state, *flags)
                    self.assertEqual(done.returncode, 2, done.stdout)
                    self.assertIn("--listen", done.stdout)
                    self.assertIn("--insecure", done.stdout)
                    self.assertIn(saying, done.stdout)
        for flags in ((*tls, *auth), (*tls, f"--tls_client_ca={root.certificate}"),
                      ("--insecure",)):
            with self.subTest(flags=flags):
                credentials = root.credentials(cert, key) if tls[0] in flags else None
                server = Server(*flags, listen="127.0.0.1:0,0.0.0.0:0", credentials=credentials)
                self.addCleanup(server.close)
                server.start()

    def test_a_unix_socket_is_plain_beside_tls_and_asks_for_tokens_too(self):
        root = Authority(self.directory)
        cert, key = root.issue("server", "normd")
        token = new_token()
        auth_file = self.directory / "auth2"
        auth_file.write_text(line(token, "a", "reader", "*"))
        path = self.directory / "socket"
        self.serve(f"--tls_cert={cert}", f"--tls_key={key}", f"--auth_file={auth_file}",
                   f"--tls_client_ca={root.certificate}", listen=f"unix:{path}")
        channel = grpc.insecure_channel(f"unix:{path}")
        self.addCleanup(channel.close)
        stub = norm_service_pb2_grpc.NormServiceStub(channel)
        stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=bearer(token))
        with refused(self, grpc.StatusCode.UNAUTHENTICATED):
            stub.GetServerInfo(pb.GetServerInfoRequest())
        done = subprocess.run([NORMCTL, f"--server=unix:{path}", "health"], check=False,
                              env={**os.environ, "NORMD_CLIENT_TLS_CA": str(root.certificate)})
        self.assertEqual(done.returncode, 0)


class Connections(WithFiles):
    """Raw sockets that cost the server more than they should."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.server = cls.serve("--handshake_timeout=1s", "--keepalive_time=1s",
                               "--keepalive_timeout=1s", "--max_connection_idle=4s")

    def connect(self):
        host, port = self.server.address.rsplit(":", 1)
        raw = socket.create_connection((host, int(port)))
        self.addCleanup(raw.close)
        return raw

    def closed_after(self, raw, answer_pings=False, drip=None, longest=15):
        """Seconds until the server hangs up; the test fails when it does not."""
        began, received = time.monotonic(), b""
        raw.settimeout(0.1)
        while time.monotonic() - began < longest:
            try:
                data = raw.recv(65536)
                if not data:
                    return time.monotonic() - began
                received += data
            except TimeoutError:
                pass
            except OSError:
                return time.monotonic() - began
            try:
                while len(received) >= 9:
                    size = int.from_bytes(received[:3], "big")
                    if len(received) < 9 + size:
                        break
                    kind, flags, body = received[3], received[4], received[9:9 + size]
                    received = received[9 + size:]
                    if kind == 6 and not flags & 1 and answer_pings:
                        raw.sendall(b"\0\0\x08\6\1\0\0\0\0" + body)
                if drip:
                    raw.sendall(drip)
            except OSError:
                return time.monotonic() - began
        self.fail(f"still open after {longest} s")

    def test_one_that_never_speaks_is_closed(self):
        self.assertLess(self.closed_after(self.connect()), 4)

    def test_one_that_drips_its_preface_is_closed(self):
        raw = self.connect()
        began = time.monotonic()
        try:
            for byte in PREFACE * 4:
                raw.sendall(bytes([byte]))
                time.sleep(0.1)
        except OSError:
            pass
        self.assertLess(time.monotonic() - began, 6)

    def test_one_whose_other_end_is_gone_is_closed(self):
        raw = self.connect()
        raw.sendall(PREFACE + SETTINGS)
        self.assertLess(self.closed_after(raw), 5)

    def test_one_that_lives_without_calls_is_closed_when_idle(self):
        raw = self.connect()
        raw.sendall(PREFACE + SETTINGS)
        self.assertLess(3, self.closed_after(raw, answer_pings=True))

    def test_one_that_drips_the_headers_of_a_call_is_closed(self):
        raw = self.connect()
        # A HEADERS frame of 4,000 bytes on stream 1, of which few ever come.
        raw.sendall(PREFACE + SETTINGS + b"\0\x0f\xa0\1\4\0\0\0\1")
        self.assertLess(self.closed_after(raw, answer_pings=True, drip=b"\0"), 15)

    def test_metadata_and_calls_at_once_are_limited(self):
        server = self.serve("--max_concurrent_streams=3", "--max_metadata_bytes=4096")
        # gRPC may close the connection of such a call afterwards: one of its own.
        with server.connect() as loud, refused(self, grpc.StatusCode.RESOURCE_EXHAUSTED):
            norm_service_pb2_grpc.NormServiceStub(loud).GetServerInfo(
                pb.GetServerInfoRequest(), metadata=(("x", "y" * 5000),))
        server.stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=(("x", "y" * 3000),))
        channel = server.connect()
        self.addCleanup(channel.close)
        stub = norm_service_pb2_grpc.NormServiceStub(channel)
        release = threading.Event()
        self.addCleanup(release.set)

        def nothing_yet():
            release.wait(30)
            return
            yield

        open_calls = [stub.ForwardStream(nothing_yet()) for _ in range(3)]
        time.sleep(0.5)
        with refused(self, grpc.StatusCode.DEADLINE_EXCEEDED):
            stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=1)
        server.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=10)
        open_calls[0].cancel()
        stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=10)

    def test_an_old_connection_is_closed_and_no_call_notices(self):
        server = self.serve("--max_connection_age=300ms", "--max_connection_age_grace=10s")
        server.stub.CreateInstance(pb.CreateInstanceRequest(name="x", config=config()))
        end = time.monotonic() + 2
        calls = 0
        while time.monotonic() < end:
            server.stub.Forward(pb.ForwardRequest(name="x", input=tensor()), wait_for_ready=True)
            calls += 1
        answer = server.stub.GetInstance(pb.GetInstanceRequest(name="x"))
        self.assertEqual(answer.instance.num_batches_tracked, calls)


class Shutdown(WithFiles):
    def test_health_flips_first_then_work_ends_and_nothing_new_is_taken(self):
        server = self.serve("--drain_timeout=20s")
        server.stub.CreateInstance(pb.CreateInstanceRequest(name="x", config=config()))
        header = pb.ForwardRequest(name="x", input=tensor())
        header.input.data = b""
        go_on = threading.Event()

        def messages():
            yield pb.ForwardStreamRequest(header=header)
            go_on.wait(20)
            yield pb.ForwardStreamRequest(chunk=tensor().data)

        watch = health_pb2_grpc.HealthStub(server.channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE.full_name))
        self.assertEqual(next(watch).status, health_pb2.HealthCheckResponse.SERVING)
        other = server.connect()
        self.addCleanup(other.close)
        under_way = norm_service_pb2_grpc.NormServiceStub(other).ForwardStream(messages())
        time.sleep(0.3)
        began = time.monotonic()
        server.signal()
        self.assertEqual(next(watch).status, health_pb2.HealthCheckResponse.NOT_SERVING)

        def is_refused():
            fresh = server.connect()
            try:
                norm_service_pb2_grpc.NormServiceStub(fresh).GetServerInfo(
                    pb.GetServerInfoRequest(), timeout=5)
            except grpc.RpcError as error:
                self.assertEqual(error.code(), grpc.StatusCode.UNAVAILABLE)
                return True
            finally:
                fresh.close()
            return False

        eventually(is_refused)
        self.assertTrue(server.alive())
        go_on.set()
        answers = list(under_way)
        self.assertEqual(answers[0].header.num_batches_tracked, 1)
        # A watcher of its health does not hold it up.
        server.wait()
        self.assertLess(time.monotonic() - began, 10)
        server.start()

    def test_restarts_under_retrying_clients_lose_and_repeat_nothing(self):
        server = self.serve("--durability=update")
        server.listen = server.address
        clients, each = 4, 60
        with Client(server.address) as client:
            client.create("x", 3)
            x = numpy.random.default_rng(1).normal(size=(2, 3, 2, 2)).astype("f4")
            done, failures = [], []

            def train():
                try:
                    for _ in range(each):
                        request_id = str(uuid.uuid4())
                        client.forward("x", x, request_id=request_id, timeout=60)
                        done.append(request_id)
                        time.sleep(0.01)
                except NormdError as error:
                    failures.append(error)

            threads = [threading.Thread(target=train) for _ in range(clients)]
            for thread in threads:
                thread.start()
            for share in (1, 2, 3):
                eventually(lambda share=share: len(done) > share * clients * each // 5 or failures,
                           60)
                server.restart()
            for thread in threads:
                thread.join()
            self.assertEqual(failures, [])
            self.assertEqual(len(set(done)), clients * each)
            self.assertEqual(client.get("x").num_batches_tracked, clients * each)


if __name__ == "__main__":
    unittest.main()
