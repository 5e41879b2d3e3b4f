"""Which cluster the demo uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from yuan2_demo.errors import DemoError
from yuan2_demo.target import build_images, choose
from yuan2_local.paths import node_state


def test_without_a_kubeconfig_the_local_cluster_is_used(tmp_path: Path) -> None:
    assert choose({"YUAN2_CACHE": str(tmp_path)}).local


def test_the_local_clusters_own_kubeconfig_means_the_local_cluster(tmp_path: Path) -> None:
    environ = {"YUAN2_CACHE": str(tmp_path)}
    assert choose({**environ, "KUBECONFIG": str(node_state(environ).kubeconfig)}).local


def test_a_foreign_cluster_wants_a_registry_for_images_but_not_for_removal(tmp_path: Path) -> None:
    foreign = tmp_path / "kubeconfig"
    foreign.touch()
    environ = {"YUAN2_CACHE": str(tmp_path), "KUBECONFIG": str(foreign)}
    assert not choose(environ).local
    with pytest.raises(DemoError, match="REGISTRY"):
        build_images(environ)


def test_a_kubeconfig_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="name one existing file"):
        choose({"KUBECONFIG": str(tmp_path / "absent")})
