"""What `vmgr metrics` tells: read by Prometheus's own parsers, on a node with real agents' sockets, and by HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser
import pytest
from nodesite import REPOSITORY, Node
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from test_vmgr_cli import Vmgr
from test_vmgr_cli import vmgr_run as vmgr_run  # the fixture

from vmgr.commands.metrics import parse_address
from vmgr.errors import VTorqueError
from vmgr.metrics import families, live, store
from vmgr.metrics.live import Live, Room
from vmgr.metrics.serve import CONNECTIONS, MAX_HEAD_BYTES, Server
from vmgr.metrics.totals import BUCKETS, Totals, fold
from vmgr.node import record
from vmgr.node.control import Control
from vmgr.node.state import Progress

pytestmark = pytest.mark.script_launch_mode("inprocess")

EVENTS = [
    {"e": "ready", "image": "micro", "guests": 2, "boot_s": 4.2, "start_s": 6.0, "hits": 2, "misses": 1},
    {"e": "ready", "image": "other", "guests": 1, "boot_s": None, "start_s": 1.0, "hits": 0, "misses": 0},
    {"e": "ready", "image": "micro", "guests": 2, "boot_s": 700, "start_s": 701, "hits": 0, "misses": 0},
    {"e": "failed", "code": "VT-BOOT"},
    {"e": "failed", "code": "VT-POLICY"},
    {"e": "ended"},
    {"e": "reaped", "kinds": {"packet filter": 2}},
]
LIVE = Live({"running": 3, "failed": 1}, 6, 2048, 1, 2, True, Room(1 << 30, 2 << 30), Room(0, 1), Room(5, 6))


def parsed(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(text: str) -> dict[tuple[str, ...], float]:
    """The values, by name and labels' values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parsed(text).values()
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def page() -> str:
    return families.text(fold(Totals(), EVENTS), LIVE).decode()


def test_guests_that_are_switched_off() -> None:
    two = {"state": "running", "guests": ["a", "b"], "members": [{"power": "on"}, {"power": "off"}]}
    one = {"state": "running", "guests": ["c"], "members": [{"power": "resetting"}]}
    last = {"state": "ready", "guests": ["d"], "members": [{"power": "off"}]}
    answers = [two, one, last, {"state": "staging", "guests": []}, {"state": "booting", "guests": ["e", "f"]}]
    assert live.guests_by_state(answers) == {"running": 2, "off": 2, "staging": 1, "booting": 2}


def test_values(page: str) -> None:
    values = samples(page)
    assert values["vtorque_guests", "running"] == 3 and values["vtorque_guests", "booting"] == 0
    assert values["vtorque_guest_vcpus",] == 6 and values["vtorque_guest_ram_bytes",] == 2 << 30
    assert values["vtorque_failures_total", "VT-BOOT"] == 1 == values["vtorque_failures_total", "VT-POLICY"]
    assert values["vtorque_failures_total", "VT-GUEST"] == 0, "known codes are there before they happen"
    assert values["vtorque_reaped_total", "packet filter"] == 2 and values["vtorque_reaped_total", "overlay"] == 0
    assert values["vtorque_kvm_works",] == 1 and values["vtorque_attempts_dead",] == 2
    assert values["vtorque_guests_ready_total", "micro"] == 4
    assert values["vtorque_guests_ready_total", "other"] == 1, "those that had been suspended have not booted"
    assert ("vtorque_boot_seconds_count", "other") not in values


def test_histograms_are_cumulative(page: str) -> None:
    values = samples(page)
    counts = [values["vtorque_boot_seconds_bucket", "micro", str(float(bound))] for bound in BUCKETS]
    assert counts == sorted(counts) and counts[BUCKETS.index(5)] == 1 and counts[BUCKETS.index(3)] == 0
    assert values["vtorque_boot_seconds_bucket", "micro", "+Inf"] == 2 == values["vtorque_boot_seconds_count", "micro"]
    assert values["vtorque_boot_seconds_sum", "micro"] == 704.2


def test_every_metric_is_told_and_described(page: str) -> None:
    told = parsed(page)
    for metric in families.METRICS:
        family = told[metric.name[: -len("_total")] if metric.kind == "counter" else metric.name]
        assert family.type == metric.kind and family.documentation
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)
    assert len(told) == len(families.METRICS)


def test_what_is_not_known_is_absent() -> None:
    text = families.text(Totals(), LIVE._replace(kvm=None, cache=None)).decode()
    assert not any(name.startswith(("vtorque_kvm", "vtorque_image_cache_bytes")) for name in parsed(text))


def test_promtool_finds_nothing(page: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool, of Debian's prometheus")
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_label_cannot_break_out() -> None:
    text = families.text(Totals(), LIVE._replace(guests={'a"} 1\nevil 2\\': 1})).decode()
    assert samples(text)["vtorque_guests", 'a"} 1\nevil 2\\'] == 1 and "\nevil" not in text


# the node


class Served(NamedTuple):
    progress: Progress
    place: record.Place


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def attempt(node: Node, job_id: str, stack: ExitStack) -> tuple[record.Place, Any]:
    place = node.place(job_id)
    lock, listener = record.create(place, {})
    stack.callback(os.close, lock)
    stack.callback(listener.close)
    return place, listener


def test_a_node_with_guests(vmgr_run: Vmgr, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts with agents, one whose agent hangs, one without; overlays reserved by the first."""
    monkeypatch.setattr(live, "ANSWER_SECONDS", 0.5)
    node = vmgr_run.node
    group = {"image": "micro", "per_node": 2, "vcpus": 4, "ram_mib": 512}

    async def look() -> Live:
        servers = []
        for job_id, state in (("1.host", "running"), ("2.host", "failed")):
            place, listener = attempt(node, job_id, stack)
            progress = Progress(place.start, {"guests": ["a", "b"]})
            progress.private = {"spec": {"groups": [group]}}
            progress.state = state
            record.append(place, {"do": "overlay", "path": "/x", "reserved": 1 << 20})
            control = Control(progress, os.geteuid(), over=lambda: None, attached=lambda: None)
            servers.append((await control.serve(listener), control))
        attempt(node, "3.host", stack)
        dead = node.place("4.host")
        lock, listener = record.create(dead, {})
        listener.close()
        os.close(lock)
        found = await live.look(node.config)
        for server, control in servers:
            server.close()
            await control.drain(1)
        return found

    found = asyncio.run(asyncio.wait_for(look(), 20))
    assert found.guests == {"running": 2, "failed": 2} and (found.vcpus, found.ram_mib) == (8, 1024)
    assert (found.silent, found.dead, found.kvm, found.cache) == (1, 1, None, None)
    assert found.overlays == Room(2 << 20, 64 << 30)


def need_root(monkeypatch: pytest.MonkeyPatch, vmgr_run: Vmgr) -> None:
    if os.geteuid() != 0:
        assert vmgr_run.refuses("metrics").startswith("VT-ACCESS: ")
        monkeypatch.setattr("vmgr.commands.metrics.os.geteuid", lambda: 0)
        monkeypatch.setattr("vmgr.config.check_trusted", lambda path: None)


def test_on_standard_output(vmgr_run: Vmgr, monkeypatch: pytest.MonkeyPatch) -> None:
    need_root(monkeypatch, vmgr_run)
    for event in EVENTS:
        store.note(vmgr_run.node.config.paths, event)
    status, out, err = vmgr_run("metrics")
    assert (status, err) == (0, "") and samples(out)["vtorque_failures_total", "VT-BOOT"] == 1
    assert samples(vmgr_run("metrics").stdout)["vtorque_failures_total", "VT-BOOT"] == 1


def test_into_a_file(vmgr_run: Vmgr, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need_root(monkeypatch, vmgr_run)
    file = tmp_path / "vtorque.prom"
    (tmp_path / ".vtorque.prom.new").symlink_to(tmp_path / "elsewhere")  # as one that died, or somebody hostile, left
    for _ in range(2):
        assert vmgr_run("metrics", "--textfile", str(file)) == (0, "", "")
        assert samples(file.read_text())["vtorque_guests", "running"] == 0
    assert file.stat().st_mode & 0o777 == 0o644 and [path.name for path in tmp_path.rglob("*prom*")] == ["vtorque.prom"]
    assert "vtorque.txt: a name that ends with .prom" in vmgr_run.refuses("metrics", "--textfile", "vtorque.txt")
    missing = tmp_path / "nope" / "x.prom"
    assert "No such file" in vmgr_run.refuses("metrics", "--textfile", str(missing))
    assert "do not go together" in vmgr_run.refuses("metrics", "--textfile", str(file), "--listen", ":0")


def test_a_reader_never_sees_half_of_the_file(vmgr_run: Vmgr, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need_root(monkeypatch, vmgr_run)
    file = tmp_path / "vtorque.prom"
    vmgr_run("metrics", "--textfile", str(file))
    with file.open() as before:
        vmgr_run("metrics", "--textfile", str(file))
        assert "vtorque_start_seconds" in before.read(), "the old one stays whole for who has it open"


# by HTTP


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (":9779", ("127.0.0.1", 9779)), ("9779", ("127.0.0.1", 9779)), ("10.1.1.4:80", ("10.1.1.4", 80)),
        ("[::1]:80", ("::1", 80)), ("0.0.0.0:1", ("0.0.0.0", 1)),
    ],
)  # fmt: skip
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "x", ":", ":x", "host:80", "::1:80", "1.2.3:80", ":70000", "10.1.1.4", ":-1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(VTorqueError, match="an address of this machine and a port"):
        parse_address(text)


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def served(work: Any, produce: Any = None, complain: Any = print) -> Any:
    """What `work` gives, called with the port of a server."""

    async def whole() -> Any:
        async def page() -> bytes:
            return b"vtorque_guests 1\n"

        async with await Server(produce or page, complain).listen("127.0.0.1", 0) as server:
            return await work(server.sockets[0].getsockname()[1])

    return asyncio.run(asyncio.wait_for(whole(), 20))


@pytest.mark.parametrize(
    ("request_line", "status", "body"),
    [
        (b"GET /metrics HTTP/1.1", b"200", b"vtorque_guests 1\n"),
        (b"GET /metrics?x=1 HTTP/1.0", b"200", b"vtorque_guests 1\n"),
        (b"HEAD /metrics HTTP/1.1", b"200", b""),
        (b"GET / HTTP/1.1", b"404", b"/metrics is here\n"),
        (b"GET /metrics/../etc/passwd HTTP/1.1", b"404", b"/metrics is here\n"),
        (b"POST /metrics HTTP/1.1", b"405", b"only GET\n"),
        (b"\xff\x00", b"405", b"only GET\n"),
    ],
)
def test_requests(request_line: bytes, status: bytes, body: bytes) -> None:
    answer = served(lambda port: ask(port, request_line + b"\r\nHost: x\r\n\r\n"))
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == status and rest == body


def test_a_head_that_never_ends() -> None:
    assert served(lambda port: ask(port, b"GET /metrics HTTP/1.1\r\n" + b"x" * (2 * MAX_HEAD_BYTES))) == b""


def test_slow_ones_are_let_go_and_many_at_once_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmgr.metrics.serve.REQUEST_SECONDS", 2)

    async def work(port: int) -> None:
        slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)]
        await asyncio.sleep(0.1)
        assert await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
        for reader, writer in slow:
            assert await reader.read() == b""
            writer.close()
        assert b"200 OK" in await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n")

    served(work)


def test_one_that_takes_nothing_keeps_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmgr.metrics.serve.REQUEST_SECONDS", 0.3)

    async def large() -> bytes:
        return bytes(16 << 20)

    async def work(port: int) -> None:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        callers = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        for caller in callers:
            caller.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        await asyncio.sleep(1)
        assert len(os.listdir("/proc/self/fd")) == before + len(callers), "the callers' own"  # noqa: PTH208
        for caller in callers:
            caller.close()

    served(work, large)


def test_asking_often_costs_the_node_once_and_a_failure_tells_no_reason() -> None:
    made: list[int] = []
    said: list[str] = []

    async def produce() -> bytes:
        made.append(1)
        if len(made) > 1:
            raise OSError("secret")
        return b"x"

    async def work(port: int) -> list[bytes]:
        request = b"GET /metrics HTTP/1.1\r\n\r\n"
        first = [await ask(port, request) for _ in range(5)]
        assert len(made) == 1 and all(b"200 OK" in answer for answer in first)
        await asyncio.sleep(1.1)
        return [await ask(port, request)]

    (answer,) = served(work, produce, said.append)
    assert b"500" in answer and b"secret" not in answer and said == ["OSError: secret"]


@pytest.mark.script_launch_mode("subprocess")
def test_as_a_program(vmgr_run: Vmgr) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    node = vmgr_run.node
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); "
        f"sys.executable = {str(node.install.root / 'venv' / 'bin' / 'python3')!r}\n"
        "from vmgr.cli import main\nsys.exit(main(['metrics', '--listen', ':0']))"
    )
    program = subprocess.Popen(
        [os.fspath(Path(sys.prefix) / "bin" / "python3"), "-c", code], stderr=subprocess.PIPE, text=True
    )
    assert program.stderr is not None
    with program.stderr:
        address = program.stderr.readline().split()[-1]
        assert address.startswith("127.0.0.1:")
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            assert samples(answer.read().decode())["vtorque_guests", "running"] == 0
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://{address}/", timeout=10)
        program.send_signal(signal.SIGTERM)
        assert program.wait(10) == 0


# the dashboard

DASHBOARD = json.loads((REPOSITORY / "contrib" / "grafana" / "vtorque.json").read_text())
SELECTED_LABELS = {"instance", "job"}
"""Labels that Prometheus itself puts on what it scrapes."""


def expressions() -> list[str]:
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    assert len(found) >= 20
    return found


def selectors(node: Any) -> Iterator[Any]:
    """The selectors in a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield from selectors(node.vector_selector)
    for part in ("expr", "lhs", "rhs", "param"):
        if getattr(node, part, None) is not None:
            yield from selectors(getattr(node, part))
    for argument in getattr(node, "args", None) or ():
        yield from selectors(argument)


def known() -> dict[str, set[str]]:
    """The labels of every series that there is, by its name."""
    names: dict[str, set[str]] = {}
    for metric in families.METRICS:
        parts = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        for part in parts:
            names[metric.name + part] = {*metric.labels, *(["le"] if part == "_bucket" else [])} | SELECTED_LABELS
    return names


def parse(expression: str) -> Any:
    return promql_parser.parse(expression.replace("$__rate_interval", "5m").replace("$instance", ".*"))


@pytest.mark.parametrize("expression", expressions())
def test_a_panel_asks_for_what_there_is(expression: str) -> None:
    series, used = known(), list(selectors(parse(expression)))
    assert used
    for selector in used:
        assert selector.name in series, selector.name
        labels = {matcher.name for matcher in selector.matchers.matchers}
        assert labels <= series[selector.name]
        assert "instance" in labels, "the choice of nodes holds for every panel"
        kept = [word.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for word in group.split(",")]
        assert set(kept) <= series[selector.name]
        if "vtorque_guests{" in expression:
            states = re.findall(r'state=~?"([^"]*)"', expression)
            assert {state for each in states for state in each.split("|")} <= set(families.STATES)


def test_the_panels_fit_together() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    cells = [(place["x"] + x, place["y"] + y) for place in places for x in range(place["w"]) for y in range(place["h"])]
    assert len(set(cells)) == len(cells), "two panels overlap"
    legends = [(target["legendFormat"], target["expr"]) for panel in panels for target in panel.get("targets", ())]
    for legend, expression in legends:
        labels = {label for selector in selectors(parse(expression)) for label in known()[selector.name]}
        assert set(re.findall(r"{{(\w+)}}", legend)) <= labels
    (variable,) = (each for each in DASHBOARD["templating"]["list"] if each["type"] == "query")
    metric = re.fullmatch(r"label_values\((\w+), instance\)", variable["query"]["query"])
    assert metric and metric[1] in known()


def test_every_metric_has_its_place_on_the_dashboard() -> None:
    used = {selector.name for expression in expressions() for selector in selectors(parse(expression))}
    for metric in families.METRICS:
        parts = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        assert any(metric.name + part in used for part in parts), metric.name
