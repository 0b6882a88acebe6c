"""Certificate authorities that live as long as a test, made by the openssl command."""

import pathlib
import subprocess

import grpc


def _openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


class Authority:
    """A root, and certificates that it vouches for; all files in `directory`."""

    def __init__(self, directory, name="root"):
        self.directory = pathlib.Path(directory)
        self.key = self.directory / f"{name}.key"
        self.certificate = self.directory / f"{name}.pem"
        _openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                 "-subj", f"/CN={name}", "-days", "2", "-keyout", self.key,
                 "-out", self.certificate)

    def issue(self, name, common_name, alt_names="IP:127.0.0.1"):
        """Files NAME.pem and NAME.key, and their paths in that order."""
        certificate, key = (self.directory / f"{name}.{end}" for end in ("pem", "key"))
        request, extensions = (self.directory / f"{name}.{end}" for end in ("csr", "ext"))
        extensions.write_text(f"subjectAltName={alt_names}\n")
        _openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj",
                 f"/CN={common_name}", "-keyout", key, "-out", request)
        _openssl("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self.key,
                 "-CAcreateserial", "-days", "2", "-extfile", extensions, "-out", certificate)
        return certificate, key

    def credentials(self, certificate=None, key=None):
        """Of a channel that believes this authority and shows these files."""
        return grpc.ssl_channel_credentials(
            self.certificate.read_bytes(), key and key.read_bytes(),
            certificate and certificate.read_bytes())
