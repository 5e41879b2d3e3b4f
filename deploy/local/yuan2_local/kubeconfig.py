"""kubeconfig files."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path


def render(server: str, pki: Path, user: str) -> str:
    """A self-contained kubeconfig (JSON, which is YAML) for the certificate called `user`."""

    def embedded(name: str) -> str:
        return base64.b64encode((pki / name).read_bytes()).decode()

    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "yuan2-local",
                "cluster": {"server": server, "certificate-authority-data": embedded("ca.crt")},
            }
        ],
        "users": [
            {
                "name": user,
                "user": {
                    "client-certificate-data": embedded(f"{user}.crt"),
                    "client-key-data": embedded(f"{user}.key"),
                },
            }
        ],
        "contexts": [{"name": "yuan2-local", "context": {"cluster": "yuan2-local", "user": user}}],
        "current-context": "yuan2-local",
    }
    return json.dumps(document, indent=2)


def write(path: Path, server: str, pki: Path, user: str) -> None:
    """Write a kubeconfig readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(render(server, pki, user))
