"""Keys, signed artifacts, and each way in which one must not pass: shared by the tests of signatures."""

import base64
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from app.artifact.manifest import MANIFEST
from app.artifact.signature import MAX_SIGNATURE_BYTES, SIGNATURE, Resource, root_digest
from model.sign import envelope, sign

PrivateKey = ec.EllipticCurvePrivateKey
KEY, OTHER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())


def public_pem(*keys: PrivateKey) -> bytes:
    pems = (key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for key in keys)
    return b"".join(pems)


def private_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_file(folder: Path, *keys: PrivateKey) -> Path:
    """A file of their public keys, outside of any artifact."""
    path = folder / "public.pem"
    path.write_bytes(public_pem(*keys))
    return path


def signed_copy(artifact: Path, folder: Path, key: PrivateKey = KEY) -> Path:
    """The artifact with a file that its manifest does not list, in a subfolder, all signed."""
    shutil.copytree(artifact, folder)
    (folder / "licences").mkdir()
    (folder / "licences" / "LICENCE.txt").write_text("Do as you like.\n")
    sign(folder, key)
    return folder


Change = Callable[[dict], object]


def edit_bundle(change: Change) -> Callable[[Path], None]:
    """Changes the signature file, parsed."""

    def damage(folder: Path) -> None:
        bundle = json.loads((folder / SIGNATURE).read_bytes())
        change(bundle)
        (folder / SIGNATURE).write_text(json.dumps(bundle))

    return damage


def edit_statement(change: Change, key: PrivateKey = KEY) -> Callable[[Path], None]:
    """Changes what is signed, and signs that."""

    def resigned(bundle: dict) -> None:
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        change(statement)
        made = envelope(json.dumps(statement).encode(), key)
        bundle["dsseEnvelope"] |= {"payload": made.payload, "signatures": [{"sig": made.signatures[0].sig}]}

    return edit_bundle(resigned)


def put(*place: str | int, value: object) -> Change:
    """Sets one value in what was parsed."""

    def change(node: dict) -> None:
        for step in place[:-1]:
            node = node[step]  # type: ignore[index]
        node[place[-1]] = value  # type: ignore[index]

    return change


def renamed(name: str) -> Change:
    """The first file under another name."""
    return put("predicate", "resources", 0, "name", value=name)


def twice(statement: dict) -> None:
    statement["predicate"]["resources"].append(statement["predicate"]["resources"][0])


def unlist(name: str) -> Change:
    def change(statement: dict) -> None:
        predicate = statement["predicate"]
        predicate["resources"] = [each for each in predicate["resources"] if each["name"] != name]
        predicate["serialization"]["ignore_paths"].append(name)
        subject_is_right(statement)

    return change


def subject_is_right(statement: dict) -> None:
    resources = [Resource(**each) for each in statement["predicate"]["resources"]]
    statement["subject"][0]["digest"]["sha256"] = root_digest(resources)


def replace_payload(bundle: dict) -> None:
    """Another statement under the signature that was there."""
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["subject"][0]["name"] = "another"
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()


def same_bytes_otherwise(bundle: dict) -> None:
    """Another last character in base64, for the same bytes."""
    signature = bundle["dsseEnvelope"]["signatures"][0]
    text = signature["sig"]
    body = text.rstrip("=")
    if body == text:  # no bits are spare: pad the payload's in its place
        signature["sig"] = text + "===="
        return
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    signature["sig"] = body[:-1] + alphabet[alphabet.index(body[-1]) ^ 1] + "=" * (len(text) - len(body))


def link(folder: Path) -> None:
    (folder / "model.onnx").rename(folder.parent / "outside.onnx")
    (folder / "model.onnx").symlink_to(folder.parent / "outside.onnx")


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return damage


@dataclass(frozen=True)
class Refusal:
    """One way to spoil a signed artifact, and what must be said of it."""

    what: str
    damage: Callable[[Path], object]
    says: str


MALFORMED = "not a signature as OpenSSF Model Signing 1.0 has it"
ENVELOPE, RESOURCE = "dsseEnvelope", ("predicate", "resources", 0)
REFUSALS = [
    Refusal("no signature", lambda folder: (folder / SIGNATURE).unlink(), f"{SIGNATURE}: no signature found"),
    Refusal("another key", lambda folder: sign(folder, OTHER), f"{SIGNATURE}: signed with another key"),
    Refusal("changed file", flip("model.onnx"), "model.onnx: sha256 mismatch: expected"),
    Refusal("changed manifest", flip(MANIFEST), f"{MANIFEST}: sha256 mismatch: expected"),
    Refusal("changed file beside", flip("licences/LICENCE.txt"), "LICENCE.txt: sha256 mismatch: expected"),
    Refusal("missing file", lambda folder: (folder / "licences/LICENCE.txt").unlink(), "LICENCE.txt: not found"),
    Refusal("no manifest", lambda folder: (folder / MANIFEST).unlink(), f"{MANIFEST}: not found"),
    Refusal("extra file", lambda folder: (folder / "more.bin").write_text("x"), "more.bin: an extra file"),
    Refusal("extra file below", lambda folder: (folder / "licences/x").write_text(""), "licences/x: an extra file"),
    Refusal("second signature", lambda folder: shutil.copy(folder / SIGNATURE, folder / "b.sig"), "b.sig: an extra"),
    Refusal("signature below", lambda folder: (folder / f"licences/{SIGNATURE}").write_text(""), "an extra file"),
    Refusal("link", link, "model.onnx: expected a file, found a link"),
    Refusal("pipe", lambda folder: os.mkfifo(folder / "pipe"), "pipe: expected a file, found a pipe or device"),
    Refusal("empty", lambda folder: (folder / SIGNATURE).write_text(""), MALFORMED),
    Refusal("no JSON", lambda folder: (folder / SIGNATURE).write_bytes(b"\xff\xfe"), MALFORMED),
    Refusal("deep JSON", lambda folder: (folder / SIGNATURE).write_text("[" * 100_000), MALFORMED),
    Refusal(
        "too large",
        lambda folder: (folder / SIGNATURE).write_bytes(b" " * (MAX_SIGNATURE_BYTES + 1)),
        f"expected at most {MAX_SIGNATURE_BYTES} bytes",
    ),
    Refusal("media type", edit_bundle(put("mediaType", value="application/json")), "mediaType"),
    Refusal("unknown field", edit_bundle(put("more", value=1)), "more"),
    Refusal("transparency log", edit_bundle(put("verificationMaterial", "tlogEntries", value=[{}])), "tlogEntries"),
    Refusal("hint", edit_bundle(put("verificationMaterial", "publicKey", "hint", value="x\n\x1b[1m")), "another key"),
    Refusal("no signatures", edit_bundle(put(ENVELOPE, "signatures", value=[])), "signatures"),
    Refusal("two signatures", edit_bundle(put(ENVELOPE, "signatures", value=[{"sig": ""}] * 2)), "signatures"),
    Refusal("empty signature", edit_bundle(put(ENVELOPE, "signatures", 0, "sig", value="")), "signature mismatch"),
    Refusal("no base64", edit_bundle(put(ENVELOPE, "payload", value="é")), MALFORMED),
    Refusal("base64 in another way", edit_bundle(same_bytes_otherwise), MALFORMED),
    Refusal("other payload", edit_bundle(replace_payload), "signature mismatch"),
    Refusal("payload type", edit_bundle(put(ENVELOPE, "payloadType", value="application/json")), "payloadType"),
    Refusal("statement type", edit_statement(put("_type", value="https://in-toto.io/Statement/v0.1")), "_type"),
    Refusal("predicate type", edit_statement(put("predicateType", value="https://slsa.dev/v1")), "predicateType"),
    Refusal("shards", edit_statement(put("predicate", "serialization", "method", value="shards")), "method"),
    Refusal("hash", edit_statement(put("predicate", "serialization", "hash_type", value="blake3")), "hash_type"),
    Refusal("algorithm", edit_statement(put(*RESOURCE, "algorithm", value="md5")), "algorithm"),
    Refusal("digest in capitals", edit_statement(put(*RESOURCE, "digest", value="A" * 64)), "digest"),
    Refusal("digest of the whole", edit_statement(put("subject", 0, "digest", "sha256", value="0" * 64)), "whole"),
    Refusal("two subjects", edit_statement(lambda each: each["subject"].append(each["subject"][0])), "subject"),
    Refusal("name twice", edit_statement(twice), "a name is there twice"),
    Refusal("name leaves", edit_statement(renamed("../outside")), "'../outside': expected a path inside the folder"),
    Refusal("absolute name", edit_statement(renamed("/etc/passwd")), "'/etc/passwd': expected a path inside"),
    Refusal("name in another way", edit_statement(renamed("licences//LICENCE.txt")), "expected a path inside"),
    Refusal("name with a null", edit_statement(renamed("a\0b")), "expected a path inside"),
    Refusal("no name", edit_statement(renamed("")), "expected a path inside"),
    Refusal(
        "everything ignored", edit_statement(put("predicate", "serialization", "ignore_paths", value=["."])), "inside"
    ),
    Refusal("unsigned manifest", edit_statement(unlist(MANIFEST)), f"{MANIFEST}: not the one that the signature lists"),
]


def named(refusals: list[Refusal]) -> dict:
    """Arguments of a parametrised test over them."""
    return {"argvalues": refusals, "ids": [each.what.replace(" ", "-") for each in refusals]}
