"""The cluster's own certificate authority, its certificates, and the key of service-account tokens."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .command import run
from .errors import ClusterError

_DAYS = "3650"


@dataclass(frozen=True)
class Certificate:
    """A certificate to issue: file name, subject, and for servers the names and addresses they answer to."""

    name: str
    common_name: str
    organization: str = ""
    dns: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """The subject as openssl takes it."""
        return (f"/O={self.organization}" if self.organization else "") + f"/CN={self.common_name}"


def certificates(node: str, api_addresses: Sequence[str], node_address: str) -> list[Certificate]:
    """Every certificate of a cluster.

    Subjects are the ones Kubernetes' default RBAC and the Node authorizer know
    (https://kubernetes.io/docs/setup/best-practices/certificates/).
    """
    service = (
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    )
    return [
        Certificate("etcd", "etcd", dns=("localhost",), addresses=("127.0.0.1",)),
        Certificate("apiserver-etcd-client", "kube-apiserver-etcd-client"),
        Certificate(
            "apiserver", "kube-apiserver", dns=(*service, "localhost"), addresses=tuple(api_addresses)
        ),
        Certificate("apiserver-kubelet-client", "kube-apiserver-kubelet-client"),
        Certificate("admin", "kubernetes-admin", "system:masters"),
        Certificate("controller-manager", "system:kube-controller-manager"),
        Certificate("scheduler", "system:kube-scheduler"),
        Certificate("kubelet", f"system:node:{node}", "system:nodes", (node,), (node_address, "127.0.0.1")),
        Certificate("kube-proxy", "system:kube-proxy"),
        Certificate("coredns", "yuan2:coredns"),
        Certificate("provisioner", "yuan2:local-provisioner"),
    ]


def extensions(certificate: Certificate) -> str:
    """openssl extension section: server use only for those that have names, client use for all."""
    names = [f"DNS:{name}" for name in certificate.dns] + [
        f"IP:{address}" for address in certificate.addresses
    ]
    usage = "serverAuth,clientAuth" if names else "clientAuth"
    lines = [
        "basicConstraints=critical,CA:FALSE",
        "keyUsage=critical,digitalSignature",
        f"extendedKeyUsage={usage}",
    ]
    if names:
        lines.append("subjectAltName=" + ",".join(names))
    return "\n".join(lines) + "\n"


def ensure_pki(directory: Path, wanted: Sequence[Certificate]) -> None:
    """Create the authority, certificates and service-account key that are not there yet (keys mode 0600)."""
    if shutil.which("openssl") is None:
        raise ClusterError("openssl: not found; install the package openssl")
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    mask = os.umask(0o077)
    try:
        if not (directory / "ca.crt").exists():
            _authority(directory)
        if not (directory / "sa.key").exists():
            _service_account_key(directory)
        for certificate in wanted:
            if not (directory / f"{certificate.name}.crt").exists():
                _issue(directory, certificate)
    finally:
        os.umask(mask)


def _openssl(*words: str | Path) -> None:
    run(["openssl", *words])


def _key(path: Path) -> None:
    # ecparam writes SEC 1, which every program of Kubernetes reads.
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)


def _authority(directory: Path) -> None:
    key = directory / "ca.key"
    usage = "keyUsage=critical,digitalSignature,keyCertSign,cRLSign"
    request = (
        "req",
        "-x509",
        "-new",
        "-sha256",
        "-days",
        _DAYS,
        "-subj",
        "/CN=yuan2-local-ca",
        "-addext",
        usage,
    )
    _key(key)
    _openssl(*request, "-key", key, "-out", directory / "ca.crt")


def _service_account_key(directory: Path) -> None:
    partial = directory / "sa.partial"
    _key(partial)
    _openssl("ec", "-in", partial, "-pubout", "-out", directory / "sa.pub")
    partial.replace(directory / "sa.key")


def _issue(directory: Path, certificate: Certificate) -> None:
    key, request = directory / f"{certificate.name}.key", directory / f"{certificate.name}.csr"
    config, partial = directory / f"{certificate.name}.ext", directory / f"{certificate.name}.partial"
    authority = ("-CA", directory / "ca.crt", "-CAkey", directory / "ca.key", "-CAcreateserial")
    _key(key)
    config.write_text(extensions(certificate))
    _openssl("req", "-new", "-sha256", "-key", key, "-subj", certificate.subject, "-out", request)
    signing = ("x509", "-req", "-sha256", "-days", _DAYS, "-in", request, "-extfile", config)
    _openssl(*signing, *authority, "-out", partial)
    request.unlink()
    config.unlink()
    partial.replace(directory / f"{certificate.name}.crt")
