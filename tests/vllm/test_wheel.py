"""The wheel that `docs/serving/vllm.md` builds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from zipfile import ZipFile

from tests.vllm.engines import ROOT


def test_the_wheel_is_the_plugin_alone(tmp_path: Path) -> None:
    source = tmp_path / "server_image"
    shutil.copytree(ROOT / "server_image", source, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    command = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("yuan2_vllm-*-py3-none-any.whl")
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        (points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert archive.read(points).decode() == "[vllm.general_plugins]\nyuan2 = yuan2_vllm:register\n"
    packages = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert packages == {"yuan2_vllm"}
    assert "yuan2_vllm/chat_template.jinja" in names


def test_the_image_tells_vllm_of_the_plugin_without_installing_it(tmp_path: Path) -> None:
    """The line of Dockerfile.serve; the directory is on PYTHONPATH there."""
    source = tmp_path / "server_image"
    shutil.copytree(ROOT / "server_image", source, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    line = "python3 -c 'import setuptools; setuptools.setup()' -q egg_info"
    assert line in (ROOT / "Dockerfile.serve").read_text("utf-8")
    own = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(line, shell=True, cwd=source, env={"PATH": own}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = distributions(path=[str(source)])
    assert [(point.group, point.value) for point in found.entry_points] == [
        ("vllm.general_plugins", "yuan2_vllm:register")
    ]
