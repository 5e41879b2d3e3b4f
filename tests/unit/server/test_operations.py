"""Keys, jobs, addresses, registration and probes."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.support.ports import free_port
from tests.support.serving import serve_job
from yuan2_core.contract import TERMINATION_LIMIT, Termination
from yuan2_core.errors import UserError
from yuan2_core.processors import available_cpus
from yuan2_server import auth
from yuan2_server.auth import KeyDirectory
from yuan2_server.engines.builtin.cache import CacheStore, token_budget, token_bytes
from yuan2_server.job import leave_termination, read_job, worker_address
from yuan2_server.lifecycle import HttpServer, in_daemon_thread
from yuan2_server.program import main
from yuan2_server.registration import Registration, heart_beat_interval
from yuan2_server.worker_app import WorkerHost


def test_keys_are_the_files_of_the_directory_and_follow_its_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    keys = KeyDirectory(tmp_path)
    (tmp_path / "one").write_text(" sk-1\n")
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "one").write_text("sk-hidden")
    (tmp_path / "empty").write_text("\n")
    assert [keys.name_of(key) for key in ("sk-1", "sk-hidden", "", "sk-")] == ["one", None, None, None]
    (tmp_path / "one").write_text("sk-2")
    assert keys.name_of("sk-1") == "one"  # read less than a second ago
    monkeypatch.setattr(auth, "REREAD_SECONDS", 0)
    assert [keys.name_of(key) for key in ("sk-1", "sk-2", "密钥", "\udcff")] == [None, "one", None, None]


def test_no_directory_is_no_key(tmp_path: Path):
    assert KeyDirectory(tmp_path / "absent").keys() == {}


def test_an_address_is_given_or_made_from_the_pods():
    assert worker_address("http://w:1/", 8504, {}) == "http://w:1"
    assert worker_address(None, 8504, {"POD_IP": "10.0.0.7"}) == "http://10.0.0.7:8504"
    assert worker_address(None, 8504, {"POD_IP": "fd00::7"}) == "http://[fd00::7]:8504"
    with pytest.raises(UserError, match="POD_IP"):
        worker_address(None, 8504, {})


@pytest.mark.parametrize(("value", "seconds"), [("", 5.0), ("45", 45.0), ("0.5", 0.5)])
def test_the_heart_beat_interval_is_fastchats(value: str, seconds: float):
    assert heart_beat_interval({"FASTCHAT_WORKER_HEART_BEAT_INTERVAL": value}) == seconds


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
def test_a_heart_beat_interval_that_is_none_is_refused(value: str):
    with pytest.raises(ValueError, match="HEART_BEAT_INTERVAL"):
        heart_beat_interval({"FASTCHAT_WORKER_HEART_BEAT_INTERVAL": value})


def test_a_job_is_read_or_its_field_named(tmp_path: Path):
    job = serve_job(tmp_path, "http://c:8503")
    path = tmp_path / "job.json"
    path.write_text(job.to_json())
    assert read_job(path) == job
    path.write_text(json.dumps({**json.loads(job.to_json()), "surprise": 1}))
    with pytest.raises(UserError, match="surprise"):
        read_job(path)
    with pytest.raises(UserError, match="--job"):
        read_job(tmp_path / "absent.json")


def test_a_termination_fits_the_kubelets_limit(tmp_path: Path):
    path = tmp_path / "termination"
    leave_termination(path, "InvalidModel", "坏" * 4000)
    left = Termination.model_validate_json(path.read_text())
    assert left.message.endswith("坏 …")
    assert TERMINATION_LIMIT - 10 < len(path.read_bytes()) <= TERMINATION_LIMIT
    leave_termination(tmp_path / "absent" / "termination", "Crashed", "x")  # only a warning


def test_the_program_ends_with_the_reason_of_a_bad_job(tmp_path: Path):
    path, left = tmp_path / "job.json", tmp_path / "termination"
    path.write_text("{}")
    assert main(["api", "--job", str(path), "--termination-log", str(left)]) == 78
    assert Termination.model_validate_json(left.read_text()).reason == "InvalidJob"


def test_cores_follow_the_quota_of_the_cgroup(tmp_path: Path):
    cores = len(os.sched_getaffinity(0))
    assert available_cpus(tmp_path) == cores
    for text, expected in (("max 100000", cores), ("50000 100000", 1), ("10000000 100000", cores)):
        (tmp_path / "cpu.max").write_text(text)
        assert available_cpus(tmp_path) == expected


def test_a_cached_token_of_the_2b_model_takes_its_keys_and_values():
    assert token_bytes(layers=24, hidden=2048, element_size=2) == 196_608
    # 0.8 of the memory, and a cache takes room for a quarter more tokens than it holds.
    assert token_budget(196_608 * 1000, 196_608) == 640
    assert len(CacheStore()) == 0


class Controller:
    """FastChat's controller as far as workers see it; `forget` is a restart."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.beats = 0
        self.clients: set[tuple[str, int]] = set()
        self.server: HttpServer | None = None
        self.port = free_port()

    async def start(self) -> None:
        async def register(request: Request) -> Response:
            body = await request.json()
            self.known[body["worker_name"]] = body["worker_status"]["model_names"]
            return JSONResponse(None)

        async def beat(request: Request) -> Response:
            self.beats += 1
            assert request.client is not None
            self.clients.add((request.client.host, request.client.port))
            return JSONResponse({"exist": (await request.json())["worker_name"] in self.known})

        routes = [
            Route("/register_worker", register, methods=["POST"]),
            Route("/receive_heart_beat", beat, methods=["POST"]),
        ]
        self.server = HttpServer(Starlette(routes=routes), self.port, "127.0.0.1")
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop()
        self.known.clear()


async def until(condition, timeout: float = 5.0) -> None:
    async def poll() -> None:
        while not condition():  # noqa: ASYNC110 -- other tasks of this loop change it
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), timeout)


async def test_a_worker_stays_registered_through_whatever_the_controller_does():
    controller, names = Controller(), ["yuan2"]
    registration = Registration(
        f"http://127.0.0.1:{controller.port}/",
        "http://w:1",
        lambda: {"model_names": names, "queue_length": 0},
        0.05,
    )
    beats = asyncio.create_task(registration.run())
    await asyncio.sleep(0.1)
    assert not registration.registered  # nobody listens yet
    await controller.start()
    await until(lambda: registration.registered and controller.beats > 1)
    assert controller.known == {"http://w:1": ["yuan2"]}

    controller.known.clear()
    await until(lambda: controller.known)

    await controller.stop()
    await until(lambda: not registration.registered)
    await controller.start()
    await until(lambda: registration.registered and controller.known)

    names.clear()
    await registration.withdraw()
    assert controller.known == {"http://w:1": []}
    beats.cancel()
    with suppress(asyncio.CancelledError):
        await beats
    await controller.stop()
    await registration.withdraw()  # nobody there: no error


async def test_a_heart_beat_never_uses_a_connection_that_the_controller_is_closing():
    controller = Controller()
    await controller.start()
    assert controller.server is not None
    registration = Registration(
        f"http://127.0.0.1:{controller.port}",
        "http://w:1",
        lambda: {"model_names": ["yuan2"], "queue_length": 0},
        0.02,
    )
    beats = asyncio.create_task(registration.run())
    await until(lambda: controller.beats > 5)
    assert len(controller.clients) > 5  # a connection each
    beats.cancel()
    with suppress(asyncio.CancelledError):
        await beats
    await controller.stop()


async def test_our_servers_keep_idle_connections_longer_than_clients_pool_them():
    async def hello(_: Request) -> Response:
        return Response("hello")

    server = HttpServer(Starlette(routes=[Route("/", hello)]), free_port(), "127.0.0.1")
    await server.start()
    assert server.config.timeout_keep_alive > 60  # nginx and AWS pool for 60 s, aiohttp for 15
    await server.stop()


async def test_a_port_that_is_taken_is_an_error_of_ours():
    first = HttpServer(Starlette(), free_port(), "127.0.0.1")
    await first.start()
    with pytest.raises(OSError, match="listen"):
        await HttpServer(Starlette(), first.port, "127.0.0.1").start()
    await first.stop()


async def test_blocking_work_gives_its_result_or_its_error():
    assert await in_daemon_thread(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        await in_daemon_thread(lambda: 1 / 0)


def test_a_worker_without_a_model_is_not_ready():
    assert WorkerHost("yuan2").ready() == "the model is being loaded"
