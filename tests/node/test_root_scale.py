"""bench/scale with few nodes: its figure, its bounds, and that nothing of it is left."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import psutil
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    loader = SourceFileLoader("scale", str(BENCH / "scale"))
    spec = spec_from_loader("scale", loader)
    assert spec is not None
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_forty_nodes(base: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(BENCH / "scale"), "40"],
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(base)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    *table, last = ended.stdout.splitlines()
    assert re.fullmatch(r"barrier: \d+\.\d\d s, \d+ MB at 40 nodes", last)
    files = [line.split()[1:4] for line in table if line.startswith("files ")]
    assert files == [["10", "20", "40"]] * 2, "each node writes one file"
    assert not list(base.iterdir())
    assert not [
        found for found in psutil.process_iter(["cmdline"]) if str(base) in " ".join(found.info["cmdline"] or ())
    ]


def test_what_is_too_much_is_told(scale: ModuleType) -> None:
    good = scale.Figures(0.5, 2.0, 2.0, 0.5, 1000, 40000, 2000, 1000.0, 1.0, 60.0)
    assert scale.broken_bounds(1000, good) == []
    for name, value in {"barrier": 5.1, "cpu": 5.1, "memory": 201.0}.items():
        (told,) = scale.broken_bounds(1000, good._replace(**{name: value}))
        assert str(value) in told
        assert scale.broken_bounds(1001, good._replace(**{name: value})) == []


def test_too_few_nodes_are_refused() -> None:
    ended = subprocess.run(
        [sys.executable, str(BENCH / "scale"), "7"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, "") and "8 is the least" in ended.stderr
