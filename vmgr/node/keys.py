"""The SSH keys of a job's guests: one host key for those of a node, vouched for by the job's own key.

So no host key has to be sent from node to node: whoever has the job's public key knows the guests of all nodes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import NamedTuple

from vmgr.errors import Code, VTorqueError
from vmgr.node import record
from vmgr.node.waiting import gone

MAX_KEY_BYTES = 4096


class HostKey(NamedTuple):
    """The SSH key of a node's guests, in OpenSSH's formats."""

    private: str
    public: str


async def make_host_key(place: record.Place) -> HostKey:
    """A new Ed25519 key, so that no guest need make one (5 to 20 s of a guest's boot under emulation)."""
    path = place.folder / "host_key"
    child = await asyncio.create_subprocess_exec(
        "ssh-keygen", "-q",
        "-t", "ed25519",
        "-N", "",
        "-C", "vtorque",
        "-f", os.fspath(path),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        status = await child.wait()
    finally:
        await gone(child)  # given up: it would write into a folder that is being removed
    if status:
        raise VTorqueError("ssh-keygen made no host key for the guests", code=Code.STAGE)
    return HostKey(path.read_text(), path.with_name("host_key.pub").read_text().strip())


def certify(host_key: HostKey, names: Sequence[str], job_key: bytes, job_public_key: str) -> str:
    """A certificate that `host_key` is that of the guests of these names, signed with the job's key; for ever.

    `job_key` is the user's file. Raises VTorqueError (VT-SPEC) when it is not the private half of `job_public_key`.
    """
    from cryptography.exceptions import UnsupportedAlgorithm  # 100 ms, which a job of one guest does without
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        SSHCertificateBuilder,
        SSHCertificateType,
        load_ssh_private_key,
        load_ssh_public_key,
    )

    try:
        signer = load_ssh_private_key(job_key, password=None)
    except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm):
        signer = None
    public = job_public_key.split()[:2]
    if (
        not isinstance(signer, Ed25519PrivateKey)
        or signer.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode().split() != public
    ):
        raise VTorqueError("the job's SSH key is not the one that it was submitted with", code=Code.SPEC)
    host = load_ssh_public_key(host_key.public.encode())
    assert isinstance(host, Ed25519PublicKey)
    certificate = (
        SSHCertificateBuilder()
        .public_key(host)
        .type(SSHCertificateType.HOST)
        .key_id(b"vtorque")
        .valid_principals([name.encode() for name in names])
        .valid_after(0)
        .valid_before((1 << 64) - 1)
        .sign(signer)
    )
    return certificate.public_bytes().decode()
