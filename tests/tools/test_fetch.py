"""model.fetch as an init container runs it: a process of its own, real servers, and a proxy that does harm."""

import hashlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from urllib.parse import unquote, urlsplit

import boto3
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from moto.server import ThreadedMotoServer

from app.artifact.manifest import MANIFEST
from model.fetch import put_in_place
from tests import onnx_models
from tests.process import ROOT, warning_libraries

BUCKET = "models"
PREFIX = "team/sentiment/1.0.0"
SECRET = "wJalrXUtnFEMI"
SIGNATURE = "sv=2024&sig=c2lnbmF0dXJl"


@dataclass
class Faults:
    """What the proxy does to the next answers for objects whose path ends so: one entry for each answer."""

    script: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    # Ends what hangs.
    over: threading.Event = field(default_factory=threading.Event)

    def next(self, path: str) -> str:
        self.asked.append(path)
        for ending, plan in self.script.items():
            if path.endswith(ending) and plan:
                return plan.pop(0)
        return "pass"


class Proxy(BaseHTTPRequestHandler):
    """Passes GET and HEAD on to `upstream`, and spoils the answers that `faults` says."""

    protocol_version = "HTTP/1.1"

    def __init__(self, upstream: str, faults: Faults, *args: object) -> None:
        self.upstream, self.faults = upstream, faults
        super().__init__(*args)

    def do_GET(self) -> None:
        fault = self.faults.next(unquote(urlsplit(self.path).path))
        passed = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        answer = httpx.request(self.command, self.upstream + self.path, headers=passed)
        body, status = answer.content, answer.status_code
        if fault.isdigit():
            status, body = int(fault), b""
        elif fault == "denied":
            status = 403
            body = b"<Error><Code>AccessDenied</Code><Message>no, says sig=c2lnbmF0dXJl</Message></Error>"
        elif fault == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif fault == "short":
            body = body[:-1]
        elif fault == "long":
            body += b"more"
        elif fault == "drip":
            body += bytes(1 << 20)
        self.send_response(status)
        length = int(answer.headers.get("content-length", 0)) if self.command == "HEAD" else len(body)
        self.send_header("content-length", str(length))
        self.send_header("content-type", answer.headers.get("content-type", "application/octet-stream"))
        self.end_headers()
        if self.command == "GET":
            if fault == "hang":
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.faults.over.wait()
            while fault == "drip" and not self.faults.over.wait(0.05):
                self.wfile.write(b" ")
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = fault != "pass"

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, *_: object) -> None:
        pass


class Files(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class Gcs(BaseHTTPRequestHandler):
    """Downloads, as the JSON API of Google Cloud Storage answers them, out of a folder."""

    def __init__(self, root: Path, *args: object) -> None:
        self.root = root
        super().__init__(*args)

    def do_GET(self) -> None:
        asked = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", urlsplit(self.path).path)
        path = self.root / asked[1] / unquote(asked[2]) if asked else self.root
        body = path.read_bytes() if path.is_file() else b'{"error": {"code": 404, "message": "No such object"}}'
        self.send_response(200 if path.is_file() else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:
        """A client that is killed or gives up is what some tests are about."""


def serve(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True).start()
        yield server
        server.shutdown()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def good(package) -> Path:
    """An artifact; what it holds does not matter here."""
    return package(onnx_models.mlp)


@pytest.fixture(scope="module")
def digest(good) -> str:
    return digest_of(good)


def digest_of(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def bucket(good) -> Iterator[str]:
    """The address of an S3 server that has the artifact."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="AKID", aws_secret_access_key=SECRET
    )
    client.create_bucket(Bucket=BUCKET)
    for path in good.iterdir():
        client.upload_file(str(path), BUCKET, f"{PREFIX}/{path.name}")
    client.close()
    yield url
    server.stop()


@pytest.fixture
def faults() -> Iterator[Faults]:
    faults = Faults()
    yield faults
    faults.over.set()


@pytest.fixture
def s3(bucket, faults) -> Iterator[dict[str, str]]:
    """Environment in which s3:// is the test's bucket, behind the proxy."""
    for server in serve(partial(Proxy, bucket, faults)):
        yield {
            "AWS_ENDPOINT_URL": address(server),
            "AWS_ACCESS_KEY_ID": "AKID",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@pytest.fixture
def web(good, faults) -> Iterator[str]:
    """The artifact's address on a web server, behind the proxy."""
    for files in serve(partial(Files, directory=str(good.parent))):
        for server in serve(partial(Proxy, address(files), faults)):
            yield f"{address(server)}/{good.name}"


S3_URL = f"s3://{BUCKET}/{PREFIX}"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "model.fetch", *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    """Nothing of this machine's credentials or proxies."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("AWS_", "GOOGLE_"))}
    kept = {name: value for name, value in kept.items() if not name.upper().endswith("_PROXY")}
    return {**kept, "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/nowhere", **extra}


def fetch(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def failed(ended: subprocess.CompletedProcess[str], code: int) -> str:
    """Its one line on standard error."""
    assert ended.returncode == code, (ended.stdout, ended.stderr)
    (line,) = ended.stderr.splitlines()
    assert line.startswith("model.fetch: ")
    return line


def same(folder: Path, other: Path) -> bool:
    return {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in other.iterdir()
    }


def model_of(folder: Path) -> Path:
    (path,) = folder.glob("*.onnx")
    return path


def nothing_left(folder: Path) -> bool:
    """Neither the artifact nor a temporary folder beside it."""
    return list(folder.parent.iterdir()) == []


def test_an_artifact_comes_from_s3(s3, good, digest, tmp_path):
    ended = fetch(S3_URL, tmp_path / "new" / "model", "--digest", digest, env=s3)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert same(tmp_path / "new" / "model", good)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_an_artifact_comes_from_google_cloud_storage(good, tmp_path):
    root = tmp_path / "gcs"
    shutil.copytree(good, root / BUCKET / PREFIX)
    for server in serve(partial(Gcs, root)):
        env = {"STORAGE_EMULATOR_HOST": address(server)}
        ended = fetch(f"gs://{BUCKET}/{PREFIX}/", tmp_path / "model", env=env)
        assert ended.returncode == 0, ended.stderr
        assert same(tmp_path / "model", good)
        line = failed(fetch(f"gs://{BUCKET}/other", tmp_path / "other", env=env), 5)
        assert f"gs://{BUCKET}/other/manifest.json: not found" in line


def test_an_artifact_comes_from_a_web_server_if_it_is_pinned(web, good, digest, tmp_path):
    assert fetch(web, tmp_path / "model", "--digest", digest).returncode == 0
    assert same(tmp_path / "model", good)
    assert "http:// proves nothing" in failed(fetch(web, tmp_path / "model"), 2)


def test_https_is_checked_against_the_trusted_certificates(good, tmp_path):
    certificate = self_signed(tmp_path)
    for server in serve(partial(Files, directory=str(good.parent))):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = f"https://127.0.0.1:{server.server_port}/{good.name}"
        line = failed(fetch(url, tmp_path / "model", "--attempts", 1), 5)
        assert f"{url}/manifest.json: the server's certificate is not trusted: self-signed certificate" in line
        assert fetch(url, tmp_path / "model", env={"SSL_CERT_FILE": str(certificate)}).returncode == 0
        assert same(tmp_path / "model", good)


def self_signed(folder: Path) -> Path:
    """A key and a certificate for 127.0.0.1, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    plain = serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_an_artifact_comes_from_a_path(good, tmp_path, form):
    assert fetch(form.format(good), tmp_path / "model").returncode == 0
    assert same(tmp_path / "model", good)


def test_files_in_folders_keep_their_places(good, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(good, source)
    model = model_of(source)
    (source / "weights of v1").mkdir()
    model.rename(source / "weights of v1" / model.name)
    text = (source / MANIFEST).read_text().replace(f'"{model.name}"', f'"weights of v1/{model.name}"')
    (source / MANIFEST).write_text(text)
    for server in serve(partial(Files, directory=str(source))):
        assert fetch(address(server), tmp_path / "model", "--digest", digest_of(source)).returncode == 0
    assert (tmp_path / "model" / "weights of v1" / model.name).read_bytes() == model_of(good).read_bytes()


def test_a_complete_artifact_is_not_fetched_again(s3, faults, good, digest, tmp_path):
    shutil.copytree(good, tmp_path / "model")
    assert fetch(S3_URL, tmp_path / "model", "--digest", digest, env=s3).returncode == 0
    assert faults.asked == []
    assert fetch(S3_URL, tmp_path / "model", env=s3).returncode == 0
    assert {path.rpartition("/")[2] for path in faults.asked} == {MANIFEST}


def test_a_complete_artifact_needs_no_server_at_all(good, digest, tmp_path):
    shutil.copytree(good, tmp_path / "model")
    assert fetch("https://127.0.0.1:1/x", tmp_path / "model", "--digest", digest).returncode == 0


def test_a_damaged_artifact_is_fetched_again(good, tmp_path):
    shutil.copytree(good, tmp_path / "model")
    model_of(tmp_path / "model").write_bytes(b"damaged")
    assert fetch(good, tmp_path / "model").returncode == 0
    assert same(tmp_path / "model", good)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut"])
def test_what_may_pass_is_tried_again(s3, web, faults, good, digest, tmp_path, fault):
    name = model_of(good).name
    for place, url, env in (("s3", S3_URL, s3), ("web", web, {})):
        faults.script = {MANIFEST: [fault], name: [fault]}
        ended = fetch(url, tmp_path / place, "--digest", digest, env=env)
        assert ended.returncode == 0, (ended.stdout, ended.stderr)
        assert same(tmp_path / place, good)
        assert f"{url}/{name}: " in ended.stdout
        assert "; try 1 of 6, the next in" in ended.stdout
        assert faults.script == {MANIFEST: [], name: []}


@pytest.mark.parametrize("fault", ["500", "cut"])
def test_what_does_not_pass_is_given_up(s3, web, faults, good, digest, tmp_path, fault):
    faults.script = {".onnx": [fault] * 20}
    for url, env in ((S3_URL, s3), (web, {})):
        ended = fetch(url, tmp_path / "model", "--digest", digest, "--attempts", 2, env=env)
        line = failed(ended, 5)
        assert f"{url}/{model_of(good).name}: " in line
        assert "given up after 2 tries" in line
        assert nothing_left(tmp_path / "model")


@pytest.mark.parametrize(
    ("fault", "says"),
    [("flip", "sha256 mismatch"), ("short", "size mismatch"), ("long", "size mismatch")],
)
def test_wrong_bytes_are_exit_code_3_and_never_seen(s3, web, faults, good, digest, tmp_path, fault, says):
    for url, env in ((S3_URL, s3), (web, {})):
        faults.script = {".onnx": [fault]}
        line = failed(fetch(url, tmp_path / "model", "--digest", digest, env=env), 3)
        assert f"{url}/{model_of(good).name}: {says}" in line
        assert nothing_left(tmp_path / "model")


def test_another_manifest_than_the_pinned_one_is_exit_code_3(s3, tmp_path):
    line = failed(fetch(S3_URL, tmp_path / "model", "--digest", "0" * 64, env=s3), 3)
    assert f"{S3_URL}/manifest.json: digest pin mismatch" in line
    assert nothing_left(tmp_path / "model")


def test_what_is_no_manifest_is_exit_code_3(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / MANIFEST).write_text("<html>log in</html>")
    assert f"{source}/manifest.json: " in failed(fetch(source, tmp_path / "place" / "model"), 3)
    assert nothing_left(tmp_path / "place" / "model")


def test_a_manifest_cannot_write_outside_the_folder(good, tmp_path):
    source, name = tmp_path / "source", model_of(good).name
    shutil.copytree(good, source)
    (source / MANIFEST).write_text((source / MANIFEST).read_text().replace(f'"{name}"', f'"../../{name}"'))
    assert "leaves the artifact folder" in failed(fetch(source, tmp_path / "place" / "model"), 3)
    assert nothing_left(tmp_path / "place" / "model")


def test_a_missing_object_is_named(s3, web, faults, good, digest, tmp_path):
    for url, env in ((S3_URL, s3), (web, {})):
        line = failed(fetch(f"{url}-no", tmp_path / "model", "--digest", digest, env=env), 5)
        assert f"{url}-no/manifest.json: not found" in line
    assert "s3://nowhere/x/manifest.json: not found" in failed(fetch("s3://nowhere/x", tmp_path / "model", env=s3), 5)
    faults.script = {".onnx": ["404"]}
    line = failed(fetch(web, tmp_path / "model", "--digest", digest), 5)
    assert f"{web}/{model_of(good).name}: not found" in line
    assert nothing_left(tmp_path / "model")


def test_a_denied_object_says_which_permission_is_missing(s3, faults, tmp_path):
    faults.script = {MANIFEST: ["denied"]}
    line = failed(fetch(S3_URL, tmp_path / "model", env=s3), 5)
    assert f"{S3_URL}/manifest.json: permission denied (AccessDenied); reading needs s3:GetObject" in line
    assert len(faults.asked) == 1


def test_no_credentials_is_said_so(s3, faults, tmp_path):
    env = {name: value for name, value in s3.items() if "ACCESS_KEY" not in name}
    line = failed(fetch(S3_URL, tmp_path / "model", env={**env, "HOME": str(tmp_path)}), 5)
    assert "no credentials found for s3://" in line
    assert faults.asked == []


@pytest.mark.parametrize("fault", ["401", "403", "denied", "404", "418", "500", "cut", "flip"])
def test_no_secret_of_the_address_is_ever_printed(web, faults, digest, tmp_path, fault):
    faults.script = {".onnx": [fault] * 9}
    url = web.replace("http://", "http://user:hunter2@") + "?" + SIGNATURE
    ended = fetch(url, tmp_path / "model", "--digest", digest, "--attempts", 2)
    failed(ended, 3 if fault == "flip" else 5)
    for secret in ("user", "hunter2", "sig=", "c2lnbmF0dXJl"):
        assert secret not in ended.stdout + ended.stderr
    assert f"{web}/manifest.json" in ended.stdout


def test_the_signature_goes_with_every_object(good, digest, tmp_path):
    asked = []

    class Signed(Files):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    for server in serve(partial(Signed, directory=str(good))):
        ended = fetch(f"{address(server)}?{SIGNATURE}", tmp_path / "model", "--digest", digest)
        assert ended.returncode == 0, ended.stderr
    assert len(asked) == len(list(good.iterdir()))
    assert all(path.endswith(f"?{SIGNATURE}") for path in asked)


def test_s3_credentials_are_never_printed(s3, faults, tmp_path):
    faults.script = {MANIFEST: ["500"] * 9}
    ended = fetch(S3_URL, tmp_path / "model", "--attempts", 2, env=s3)
    failed(ended, 5)
    assert SECRET not in ended.stdout + ended.stderr
    assert "AKID" not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "URL: file: expected"),
        ("ftp://host/x", "URL: ftp: expected"),
        ("s3:///x", "URL: s3: expected"),
        ("simplecache::s3://models/x", "URL: simplecache: expected"),
        ("s3://models/x?versionId=1", "found a query"),
        ("https://host:port/x", "URL: not a valid address"),
    ],
)
def test_an_address_of_no_known_kind_is_exit_code_2(tmp_path, url, says):
    assert says in failed(fetch(url, tmp_path / "model"), 2)


@pytest.mark.parametrize("paste", ["sha256:{}", "{}"])
def test_a_digest_pins_as_people_paste_it(web, digest, tmp_path, paste):
    pin = paste.format(digest.upper())
    assert fetch(web, tmp_path / "model", "--digest", pin).returncode == 0
    # What is there is recognised, too.
    assert fetch("https://127.0.0.1:1/x", tmp_path / "model", "--digest", pin).returncode == 0
    line = failed(fetch(web, tmp_path / "other", "--digest", paste.format("0A" * 32)), 3)
    assert f"digest pin mismatch: expected sha256 {'0a' * 32}, found {digest}" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("--digest", "latest"),
        ("--digest", "sha256:"),
        ("--attempts", "0"),
        ("--timeout-seconds", "0"),
        ("--timeout-seconds", "nan"),
        ("--timeout-seconds", "inf"),
    ],
)
def test_bad_arguments_are_exit_code_2(good, tmp_path, arguments):
    assert fetch(good, tmp_path / "model", *arguments).returncode == 2


def test_a_folder_that_is_no_artifact_is_left_alone(good, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"cat")
    assert "it will not be replaced" in failed(fetch(good, folder), 2)
    assert [path.name for path in folder.iterdir()] == ["cat.jpg"]
    assert "not a folder" in failed(fetch(good, folder / "cat.jpg"), 2)


def test_an_older_artifact_stays_until_the_new_one_is_complete(web, faults, good, digest, package, tmp_path):
    folder, old = tmp_path / "model", package(onnx_models.mlp, version="6")
    shutil.copytree(old, folder)
    faults.script = {".onnx": ["flip"]}
    failed(fetch(web, folder, "--digest", digest), 3)
    assert same(folder, old)
    assert fetch(web, folder, "--digest", digest).returncode == 0
    assert same(folder, good)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_mount_point_is_refused_before_anything_is_fetched(good):
    assert "a mount point cannot be replaced" in failed(fetch(good, "/proc"), 2)


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for_half(process: subprocess.Popen[str], folder: Path) -> None:
    """Until the model's download has begun."""
    while not any(folder.glob(".model.fetch-*/new/*.onnx")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_stopped_leaves_no_part_that_looks_like_an_artifact(
    web, faults, good, digest, tmp_path, stop
):
    faults.script = {".onnx": ["hang"]}
    with start(web, tmp_path / "model", "--digest", digest) as process:
        wait_for_half(process, tmp_path)
        assert not (tmp_path / "model").exists()
        process.send_signal(stop)
        assert process.wait(20) == (128 + stop if stop == signal.SIGTERM else -stop)
    assert not (tmp_path / "model").exists()
    assert nothing_left(tmp_path / "model") == (stop == signal.SIGTERM)
    # What a killed one left is removed by the next.
    assert fetch(web, tmp_path / "model", "--digest", digest).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_server_that_always_sends_a_little_more_is_given_up(web, faults, digest, tmp_path):
    faults.script = {MANIFEST: ["drip"]}
    line = failed(fetch(web, tmp_path / "model", "--digest", digest, "--timeout-seconds", 1), 5)
    assert re.search(rf"{web}: given up: 0\.0 MB in \d+\.\d s; --timeout-seconds", line)
    assert nothing_left(tmp_path / "model")


def test_one_that_takes_too_long_says_how_much_has_come(web, faults, good, digest, tmp_path):
    faults.script = {".onnx": ["hang"]}
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    model_of(folder).write_bytes(b"damaged")
    with start(web, folder, "--digest", digest) as process:
        wait_for_half(process, tmp_path)
        process.send_signal(signal.SIGALRM)  # as its timer does
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 5
    (line,) = errors.splitlines()
    assert re.search(r"given up: \d+\.\d of \d+\.\d MB in \d+\.\d s; --timeout-seconds", line)
    # What was there is as it was.
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert model_of(folder).read_bytes() == b"damaged"


def test_what_was_there_comes_back_wherever_a_signal_interrupts(good, tmp_path, monkeypatch):
    staged, folder = tmp_path / "outer" / "new", tmp_path / "model"
    staged.mkdir(parents=True)
    shutil.copytree(good, folder)
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path == staged:
            raise SystemExit
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(SystemExit):
        put_in_place(staged, folder)
    assert same(folder, good)


@pytest.mark.parametrize("there", [True, False])
def test_nothing_printed_controls_a_terminal(good, tmp_path, there):
    source, hostile = tmp_path / "source", "\x1b[2J\x9b2J\r\n\u202e.onnx"
    shutil.copytree(good, source)
    model = model_of(source)
    text = (source / MANIFEST).read_text().replace(f'"{model.name}"', json.dumps(hostile))
    (source / MANIFEST).write_text(text)
    model.rename(source / hostile)
    if not there:
        (source / hostile).unlink()
    ended = fetch(source, tmp_path / "model")
    assert ended.returncode == (0 if there else 5), ended.stderr
    assert r"\x1b[2J\x9b2J \u202e.onnx" in (ended.stdout if there else failed(ended, 5))
    assert (ended.stdout + ended.stderr).replace("\n", "").isprintable()


def test_what_libraries_warn_of_is_not_beside_the_one_line(web, tmp_path):
    env = warning_libraries(tmp_path)
    assert "digest pin mismatch" in failed(fetch(web, tmp_path / "model", "--digest", "0" * 64, env=env), 3)


def test_one_that_runs_is_not_disturbed_by_another(web, faults, good, digest, tmp_path):
    faults.script = {".onnx": ["hang"]}
    with start(web, tmp_path / "model", "--digest", digest) as process:
        wait_for_half(process, tmp_path)
        assert fetch(good, tmp_path / "model", "--digest", digest).returncode == 0
        assert len(list(tmp_path.iterdir())) == 2
        process.terminate()
    assert same(tmp_path / "model", good)


def test_what_it_needs_is_only_what_its_image_holds():
    script = (
        "import sys, model.fetch\n"
        "own = sorted(name for name in sys.modules if name.split('.')[0] in ('app', 'model'))\n"
        "heavy = {'onnxruntime', 'fastapi', 'uvicorn', 'tokenizers', 'pydantic'} & set(sys.modules)\n"
        "print(own, heavy)\n"
    )
    said = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True)
    artifact = [
        "app.artifact",
        *(f"app.artifact.{name}" for name in ("datatypes", "integrity", "manifest", "signature")),
    ]
    own = ["app", *artifact, "app.errors", "model", "model.fetch"]
    assert said == f"{own} set()\n"
    dockerfile = (ROOT / "docker" / "fetch.Dockerfile").read_text()
    assert "COPY app/__init__.py app/errors.py /srv/app/" in dockerfile
    assert "COPY app/artifact /srv/app/artifact" in dockerfile
    assert "COPY model/__init__.py model/fetch.py /srv/model/" in dockerfile
