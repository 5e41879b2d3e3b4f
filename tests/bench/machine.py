"""On what a benchmark ran: a figure without its machine says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from yuan2_core.processors import available_cpus

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "sve",
    "i8mm",
    "bf16",
)
"""Flags of a processor that decide which kernels of torch and oneDNN run."""
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
"""Variables that make torch and oneDNN use less than the processor has."""


@dataclass(frozen=True)
class Machine:
    """Where and when a report was measured.

    Attributes:
        processor: its model, as the kernel names it.
        instructions: those of `INSTRUCTIONS` that it has, and what limits them.
        cores: processors that this process may use.
        threads: of torch; None where torch computes nothing.
        load: runnable processes over the last minute, before the measurement.
        memory_gb: of the machine.
        torch: its version; None where it is not installed.
        commit: of the working tree; "+" behind it where files were changed.
        started: time of day, UTC.
    """

    processor: str
    instructions: str
    cores: int
    threads: int | None
    load: float
    memory_gb: float
    torch: str | None
    commit: str
    started: str

    def __str__(self) -> str:
        threads = "" if self.threads is None else f", {self.threads} threads"
        torch = "" if self.torch is None else f", torch {self.torch}"
        return (
            f"{self.processor} ({self.instructions}), {self.cores} cores{threads}, {self.memory_gb:.0f} GB, "
            f"load {self.load:.1f} at the start{torch}, commit {self.commit}, {self.started}"
        )


def this_machine(threads: int | None = None) -> Machine:
    """The machine as it is now."""
    cpuinfo = Path("/proc/cpuinfo")
    facts = first_processor(cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else "")
    return Machine(
        processor=processor_name(facts),
        instructions=instructions(facts, os.environ),
        cores=available_cpus(),
        threads=threads,
        load=round(os.getloadavg()[0], 2),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        torch=_version("torch"),
        commit=_commit(),
        started=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
    )


def first_processor(cpuinfo: str) -> dict[str, str]:
    """The first block of /proc/cpuinfo."""
    lines = cpuinfo.split("\n\n", 1)[0].splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def processor_name(facts: Mapping[str, str]) -> str:
    """Model, with family and number where x86 tells them: a cloud's names often say no more than the
    maker's."""
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    number = f" (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else ""
    return facts["model name"] + number


def instructions(facts: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """Those that matter, in words."""
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    found = [name for name in INSTRUCTIONS if name in flags]
    limits = [f"{name}={environ[name]}" for name in LIMITS if name in environ]
    return ", ".join([*found, *limits]) or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
