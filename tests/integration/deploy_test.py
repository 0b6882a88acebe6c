"""The manifests of deploy/, obeyed: normd with exactly their environment, their Secrets and their
probes. What only a cluster could tell is not asked here."""

import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

import grpc
import yaml
from harness.certificates import Authority
from harness.errors import refused
from harness.server import NORMD, Server, environment, run_normd
from normd.v1 import norm_service_pb2 as pb

NORMCTL = os.environ.get("NORMCTL_BIN", "build/release/bin/normctl")
DEPLOY = pathlib.Path(__file__).resolve().parents[2] / "deploy"


class Kubernetes(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="normd-deploy-"))
        self.addCleanup(shutil.rmtree, self.directory)
        manifests = yaml.safe_load_all((DEPLOY / "kubernetes/normd.yaml").read_text())
        self.pod = next(each for each in manifests
                        if each["kind"] == "StatefulSet")["spec"]["template"]["spec"]
        [self.container] = self.pod["containers"]
        # Where the pod has a volume, this machine has a directory.
        self.mounts = {mount["mountPath"]: self.directory / mount["name"]
                       for mount in self.container["volumeMounts"]}
        for path in self.mounts.values():
            path.mkdir()
        self.env = {each["name"]: self.here(each["value"])
                    for each in self.container["env"] if "value" in each}

    def here(self, value):
        for path, directory in self.mounts.items():
            value = value.replace(path + "/", f"{directory}/")
            value = str(directory) if value == path else value
        return value.replace(":50051", ":0")  # a free port

    def make_secrets(self):
        """As the manifest's first lines say, and where the pod's volumes bring them."""
        root = Authority(self.directory)
        certificate, key = root.issue("tls", "normd", "IP:0.0.0.0")
        token = self.directory / "trainer.token"
        line = subprocess.run([NORMCTL, "token", "new", "--name=trainer", "--role=admin",
                               f"--output={token}"], check=True, stdout=subprocess.PIPE).stdout
        secrets = {"normd-tls": {"tls.crt": certificate.read_bytes(), "tls.key": key.read_bytes()},
                   "normd-auth": {"auth": line}}
        for volume in self.pod["volumes"]:
            for name, content in secrets.get(volume.get("secret", {}).get("secretName"), {}).items():
                (self.directory / volume["name"] / name).write_bytes(content)
        return root, token

    def test_with_its_secrets_it_serves_those_with_a_token_alone_and_its_probes_pass(self):
        root, token = self.make_secrets()
        server = Server(env=self.env, credentials=root.credentials())
        server.command = lambda: [NORMD, f"--port_file={server.port_file}"]
        self.addCleanup(server.close)
        server.start()
        with refused(self, grpc.StatusCode.UNAUTHENTICATED):
            server.stub.GetServerInfo(pb.GetServerInfoRequest())
        plain = grpc.insecure_channel(server.address)
        self.addCleanup(plain.close)
        with refused(self, grpc.StatusCode.UNAVAILABLE):
            plain.unary_unary("/normd.v1.NormService/GetServerInfo")(b"", timeout=10)
        bearer = ("authorization", f"Bearer {token.read_text().strip()}")
        server.stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=[bearer])

        probes = {name: self.container[name]["exec"]["command"]
                  for name in ("startupProbe", "readinessProbe", "livenessProbe")}

        def probe(command):
            self.assertEqual(command[0], "normctl")
            return subprocess.run([NORMCTL, *command[1:]], env=environment(self.env), text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        for name, command in probes.items():
            # Asked again as the kubelet asks: on a busy machine a probe may run out of time.
            tries = []
            while len(tries) < 5 and (0, "SERVING\n") not in tries:
                done = probe(command)
                tries.append((done.returncode, done.stdout))
            self.assertIn((0, "SERVING\n"), tries, name)
        server.kill()
        for name, command in probes.items():
            self.assertNotEqual(probe(command).returncode, 0, name)
        server.start()

    def test_without_its_secrets_it_does_not_start(self):
        done = run_normd(env=self.env)
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn("tls.crt", done.stdout)
        # Nor with what the image brings alone.
        listen = {name: self.env[name] for name in ("NORMD_LISTEN", "NORMD_STATE_DIR")}
        done = run_normd(env=listen)
        self.assertEqual(done.returncode, 2, done.stdout)
        self.assertIn("--insecure", done.stdout)


class Compose(unittest.TestCase):
    def test_what_trusts_everybody_is_mapped_to_this_machine_alone(self):
        service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["normd"]
        if service["environment"].get("NORMD_INSECURE") == "true":
            for port in service["ports"]:
                self.assertTrue(port.startswith("127.0.0.1:"), port)


if __name__ == "__main__":
    unittest.main()
