"""A worker whose engine has failed: it leaves the list, and its liveness probe says why."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.ports import free_port
from tests.support.serving import serve_job, tiny_model
from tests.unit.server.test_operations import Controller, until
from yuan2_server import run_worker as program
from yuan2_server.job import EngineFailedError
from yuan2_server.worker import ModelWorker

BROKEN = "the model fails even for a single token: RuntimeError: CUDA error: device-side assert triggered"


async def test_a_worker_whose_engine_fails_leaves_the_list_and_its_liveness_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny_model(tmp_path)
    controller, stop, port, told = Controller(), asyncio.Event(), free_port(), []
    await controller.start()
    workers: list[ModelWorker] = []
    load = program.load_served_model

    def load_and_keep(job: Any) -> Any:
        model = load(job)
        workers.append(model)
        return model

    monkeypatch.setattr(program, "load_served_model", load_and_keep)
    monkeypatch.setattr(program, "stop_requested", lambda: stop)
    monkeypatch.setattr(program, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(program, "WATCH_SECONDS", 0.01)
    monkeypatch.setenv("FASTCHAT_WORKER_HEART_BEAT_INTERVAL", "0.05")
    url = f"http://127.0.0.1:{port}"
    job = serve_job(tmp_path, f"http://127.0.0.1:{controller.port}", port=port)
    life = asyncio.create_task(program.run_worker(job, url, told.append))
    await until(lambda: controller.known.get(url) == ["yuan2"], 60)

    async with httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/healthz")).text == "ok"
        runner = workers[0].engine._runner

        def forward(**_: Any) -> None:
            raise RuntimeError("CUDA error: device-side assert triggered")

        monkeypatch.setattr(runner._model.model, "forward", forward)
        body = {"model": "yuan2", "prompt": "x", "max_new_tokens": 5}
        assert (await client.post("/worker_generate", json=body)).json()["error_code"] == 50001
        await until(lambda: controller.known[url] == [] and told)
        assert told == [BROKEN]
        for path in ("/healthz", "/readyz"):
            answer = await client.get(path)
            assert (answer.status_code, answer.text) == (503, BROKEN)
        # Another worker takes what still arrives.
        assert (await client.post("/worker_generate", json=body)).json()["error_code"] == 42903
        assert (await client.post("/worker_get_status")).json()["model_names"] == []
    stop.set()
    with pytest.raises(EngineFailedError, match="device-side assert"):
        await life
    await controller.stop()
