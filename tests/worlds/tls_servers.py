"""The fault server over TLS, with a certificate of its own."""

import ssl
import subprocess
from pathlib import Path

import pytest
from fault_server import Client, FaultServer
from range_downloads import DATA


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file with key and certificate of files.example."""
    both = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(both), "-out", str(both.with_suffix(".crt"))),
            *("-subj", "/CN=files.example", "-addext", "subjectAltName=DNS:files.example"),
        ],
        check=True,
        capture_output=True,
    )
    both.write_bytes(both.read_bytes() + both.with_suffix(".crt").read_bytes())
    return both


class TlsServer(FaultServer):
    """A fault server over TLS; a failed handshake ends the connection."""

    context: ssl.SSLContext

    def _serve(self, client: Client) -> None:
        try:
            client.socket = self.context.wrap_socket(client.socket, server_side=True)
        except OSError:
            client.socket.close()
            return
        super()._serve(client)


def tls_server(certificate: Path) -> TlsServer:
    server = TlsServer(DATA)
    server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.context.load_cert_chain(certificate)
    return server
