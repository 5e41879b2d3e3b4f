"""What the demo says about an object's status, and how it writes it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from yuan2_demo import install, status
from yuan2_demo.cli import below_home
from yuan2_demo.errors import DemoError
from yuan2_demo.target import build_images, choose
from yuan2_demo.terminal import Terminal, clip, columns, seconds


def resource(*conditions: tuple[str, str, str], generation: int = 1, **fields: Any) -> dict[str, Any]:
    entries = [
        {"type": kind, "status": state, "reason": "Why", "message": message, "observedGeneration": generation}
        for kind, state, message in conditions
    ]
    return {"metadata": {"generation": 1}, "status": {"conditions": entries, **fields}}


def test_a_condition_of_an_older_generation_does_not_count() -> None:
    old = resource(("Complete", "True", "done"), generation=0)
    assert not status.is_true(old, "Complete")
    assert status.is_true(resource(("Complete", "True", "done")), "Complete")


def test_the_sentence_is_that_of_the_worst_condition() -> None:
    obj = resource(
        ("Accepted", "True", "fine"), ("Running", "False", "no node fits"), ("Failed", "True", "disk full")
    )
    assert status.sentence(obj) == "Why: disk full"
    assert status.sentence(resource(("Running", "False", "no node fits"))) == "Why: no node fits"
    assert status.sentence(resource(("Accepted", "True", "fine"))) == ""
    assert status.sentence({}) == ""


def test_a_usual_start_needs_no_sentence() -> None:
    starting = resource(("Ready", "False", "0 of 1 worker pods are ready"))
    starting["status"]["conditions"][0]["reason"] = "Starting"
    assert status.sentence(starting) == ""


def test_progress_comes_from_rank_0_while_it_answers() -> None:
    finetune = resource(step=10, totalSteps=100, loss=2.0, phase="Running")
    live = {
        "state": "training",
        "step": 15,
        "totalSteps": 100,
        "loss": 1.5,
        "tokensPerSecond": 900.4,
        "etaSeconds": 7,
    }
    assert status.training(finetune, live) == status.Training("training", 15, 100, 1.5, 900.4, 7)
    assert status.training(finetune, None) == status.Training("running", 10, 100, 2.0)
    assert status.training({}, {"state": "preparing", "step": 0}).state == "preparing"


def test_a_status_that_lags_takes_nothing_back() -> None:
    live = status.Training("training", 90, 100, 0.5, 900.0, 3)
    assert status.furthest(status.Training("pending"), live) == live
    assert status.furthest(live, status.Training("running", 70, 100, 0.9)) == live
    done = status.Training("complete", 100, 100, 0.1, 900.0, 0)
    assert status.furthest(live, done) == done
    ending = status.furthest(done, status.Training("running", 70, 100, 0.9))
    assert (ending.step, ending.loss, ending.state) == (100, 0.1, "trained, pods are ending:")
    assert status.furthest(ending, status.Training("pending")).step == 100


def test_a_restarted_run_without_progress_shows_its_status() -> None:
    before, now = status.Training("running", 10, 100, 1.0), status.Training("running", 20, 100, 0.8)
    assert status.furthest(before, now) == now


def test_the_bar_shows_what_is_known() -> None:
    text = status.bar(status.Training("training", 50, 100, 1.5, 900.4, 7.2))
    assert text == f"training {'█' * 12}{'░' * 12} 50/100  loss 1.5000  900 tokens/s  ETA 7 s"
    assert status.bar(status.Training("exporting", 2, 2)) == f"exporting {'█' * 24} 2/2"


def test_pods_say_why_they_wait() -> None:
    waiting = {
        "containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}],
        "phase": "Pending",
    }
    rank = {"batch.kubernetes.io/job-completion-index": "1", "yuan2.dev/component": "trainer"}
    pods = [
        {"metadata": {"name": "a"}, "status": waiting},
        {"metadata": {"name": "b-x7", "labels": rank}, "status": {"phase": "Running"}},
        {
            "metadata": {"name": "c-x7", "labels": {"yuan2.dev/component": "api"}},
            "status": {"phase": "Running"},
        },
    ]
    assert status.pods_line(pods) == "a ImagePullBackOff, pod 1 Running, api Running"


def test_a_log_gets_a_line_when_the_key_changes_and_no_escape_codes() -> None:
    stream = io.StringIO()
    terminal = Terminal(2, stream)
    terminal.step("train")
    for step in range(30):
        terminal.live(f"step {step}", key=str(step // 10))
    terminal.done("complete")
    assert stream.getvalue().splitlines() == [
        "[1/2] train",
        "      step 0",
        "      step 10",
        "      step 20",
        "      complete (0 s)",
    ]


class _Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_line_that_is_cleared_before_the_next() -> None:
    stream = _Tty()
    terminal = Terminal(1, stream)
    terminal.live("waiting")
    terminal.line("done")
    assert stream.getvalue() == "\r\x1b[2K      waiting\r\x1b[2Kdone\n"


def test_wide_characters_count_twice() -> None:
    assert columns("ok 源") == 5
    assert clip("源源源", 5) == "源源…"
    assert clip("short", 5) == "short"


def test_durations_read_as_people_say_them() -> None:
    assert [seconds(value) for value in (8.4, 59.4, 125)] == ["8 s", "59 s", "2 min 5 s"]


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("localhost:5000/yuan2/train:abc", {"newName": "localhost:5000/yuan2/train", "newTag": "abc"}),
        ("localhost:5000/yuan2/train", {"newName": "localhost:5000/yuan2/train", "newTag": "latest"}),
        ("r.example/train@sha256:12", {"newName": "r.example/train", "digest": "sha256:12"}),
    ],
)
def test_references_are_split_for_kustomize(reference: str, parts: dict[str, str]) -> None:
    assert install.split_reference(reference) == parts


def test_only_what_carries_the_label_is_the_demos() -> None:
    assert install.installed_by_demo(install.namespace())
    assert not install.installed_by_demo({"metadata": {"name": "yuan2-demo"}})
    assert not install.installed_by_demo(None)


def test_paths_below_home_are_shown_as_people_type_them() -> None:
    assert below_home(Path.home() / ".cache/yuan2/bin") == "~/.cache/yuan2/bin"
    assert below_home(Path("/var/lib/yuan2/kubeconfig")) == "/var/lib/yuan2/kubeconfig"


def test_the_target_is_local_unless_a_foreign_kubeconfig_is_named(tmp_path: Any) -> None:
    foreign = tmp_path / "config"
    foreign.write_text("{}")
    state = {"YUAN2_STATE": str(tmp_path / "state")}
    own = str(tmp_path / "state" / "kubeconfig")
    assert choose(state).local
    assert choose(state | {"KUBECONFIG": own}).local
    target = choose(state | {"KUBECONFIG": str(foreign)})
    assert (target.kubeconfig, target.local) == (foreign, False)
    with pytest.raises(DemoError, match="one existing file"):
        choose(state | {"KUBECONFIG": str(tmp_path / "absent")})


def test_a_foreign_cluster_wants_a_registry_for_its_images(tmp_path: Any) -> None:
    foreign = tmp_path / "config"
    foreign.write_text("{}")
    with pytest.raises(DemoError, match="REGISTRY is not"):
        build_images({"YUAN2_CACHE": str(tmp_path), "KUBECONFIG": str(foreign)})
