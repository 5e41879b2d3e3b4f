"""What a pod is told: the ServeJob file, its own address, and what it leaves behind when it cannot work."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from yuan2_core.contract import TERMINATION_LIMIT, ServeJob, Termination
from yuan2_core.errors import UserError

log = logging.getLogger(__name__)


class EngineFailedError(Exception):
    """The worker was asked to stop after its engine had failed; the message says how."""


def read_job(path: Path) -> ServeJob:
    """The job in a file. Raises UserError (reason InvalidJob) that names the field."""
    try:
        return ServeJob.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give --job") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the document"
        raise UserError(f"{path}: {field}: {first['msg']}") from error


def worker_address(given: str | None, port: int, environment: Mapping[str, str] = os.environ) -> str:
    """The URL that other pods reach this worker at: as given, or from `POD_IP`. Raises UserError when it has
    neither."""
    if given:
        return given.rstrip("/")
    ip = environment.get("POD_IP", "")
    if not ip:
        raise UserError(
            "the worker does not know its own address: set POD_IP, or give --address http://HOST:PORT"
        )
    return f"http://[{ip}]:{port}" if ":" in ip else f"http://{ip}:{port}"


def leave_termination(path: Path, reason: str, message: str) -> None:
    """Write why this container ends into its termination log, at most `TERMINATION_LIMIT` bytes; best
    effort."""
    text = Termination(reason=reason, message=message).to_json()
    surplus = len(text.encode()) - TERMINATION_LIMIT
    if surplus > 0:
        kept = message.encode()[: -surplus - len(" …".encode())].decode(errors="ignore")
        text = Termination(reason=reason, message=kept + " …").to_json()
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        log.warning("%s: cannot be written: %s", path, error.strerror)
