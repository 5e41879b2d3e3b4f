"""`python -m yuan2_server worker|api|web`: the programs of a Yuan2Service's pods."""

from __future__ import annotations

import argparse
import asyncio
import logging
from pathlib import Path

from yuan2_core.contract import (
    EXIT_COMPLETE,
    EXIT_CRASHED,
    EXIT_INVALID,
    JOB_FILE,
    KEYS_DIRECTORY,
    TERMINATION_LOG,
)
from yuan2_core.errors import UserError
from yuan2_server.job import EngineFailedError, leave_termination, read_job, worker_address
from yuan2_server.requests import WithRequestId

log = logging.getLogger("yuan2_server")

ENGINE_FAILED = "EngineFailed"
"""`Termination.reason` of a worker whose model cannot be computed any more."""


def main(arguments: list[str] | None = None) -> int:
    """Run one program until SIGTERM and return its exit code (`yuan2_core.contract`)."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s [%(request)s]: %(message)s"
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(WithRequestId())
    if options.program == "web":
        from yuan2_server.web_gate import run_web

        return asyncio.run(run_web(options.port, options.page_port, options.controller_url, options.keys))
    try:
        _run(options)
    except UserError as error:
        return _ended(options, EXIT_INVALID, error.reason, str(error))
    except EngineFailedError as error:
        return _ended(options, EXIT_CRASHED, ENGINE_FAILED, str(error))
    except OSError as error:
        return _ended(options, EXIT_CRASHED, "Crashed", str(error))
    return EXIT_COMPLETE


def _run(options: argparse.Namespace) -> None:
    job = read_job(options.job)
    # Each program imports only what it needs: the API server starts without torch.
    if options.program == "worker":
        from yuan2_server.run_worker import run_worker

        def tell(problem: str) -> None:
            # Liveness fails from now on: the kubelet finds the reason here when it ends the container.
            leave_termination(options.termination_log, ENGINE_FAILED, problem)

        asyncio.run(run_worker(job, worker_address(options.address, job.worker.port), tell))
    else:
        from yuan2_server.run_api import run_api

        asyncio.run(run_api(job, options.keys))


def _ended(options: argparse.Namespace, code: int, reason: str, message: str) -> int:
    log.error("%s", message)
    leave_termination(options.termination_log, reason, message)
    return code


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--job", type=Path, default=Path(JOB_FILE), help="the ServeJob file (default: %(default)s)"
    )
    common.add_argument("--termination-log", type=Path, default=Path(TERMINATION_LOG), help=argparse.SUPPRESS)
    parser = argparse.ArgumentParser(prog="python -m yuan2_server", description=__doc__)
    programs = parser.add_subparsers(dest="program", required=True)
    worker = programs.add_parser("worker", parents=[common], help="serve a model to FastChat's controller")
    worker.add_argument("--address", help="URL that others reach this worker at (default: from POD_IP)")
    api = programs.add_parser("api", parents=[common], help="answer OpenAI's API")
    api.add_argument(
        "--keys", type=Path, default=Path(KEYS_DIRECTORY), help="directory with a file for each key"
    )
    web = programs.add_parser("web", help="FastChat's web page behind the API keys")
    web.add_argument("--port", type=int, required=True, help="where the page is asked for, with a key")
    web.add_argument(
        "--page-port", type=int, required=True, help="where the page itself listens, on loopback"
    )
    web.add_argument("--controller-url", required=True, help="FastChat's controller")
    web.add_argument(
        "--keys", type=Path, default=Path(KEYS_DIRECTORY), help="directory with a file for each key"
    )
    return parser
