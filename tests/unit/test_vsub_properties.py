"""What holds for any input: what was read can be written back, what was fitted fits, and nothing is a fault of ours.

What qsub would understand is told by two oracles that share no code with vsub: Python's own getopt with TORQUE's
option string, and a small model of how qsub goes over a script.
"""

from __future__ import annotations

import getopt
import io
import os
import re
from pathlib import Path
from typing import Any, Optional

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from nodesite import an_image
from test_vsub_table import standard_input
from vsubsite import Runner, Site

from vmgr.checks import Checker, Features
from vmgr.errors import VTorqueError
from vmgr.jobspec import GuestGroup, Iocm
from vmgr.policy import Policy
from vmgr.request import Asked
from vsub.attributes import read_attributes
from vsub.directives import read_directives
from vsub.fit import PER_PROCESS, Fitted, fit
from vsub.hostrequest import (
    MEMORY,
    Chunk,
    HostRequest,
    Nodes,
    Tasks,
    parse_nodes,
    parse_size,
    parse_tasks,
    read_host_request,
)
from vsub.options import Option, parse_line
from vsub.resources import Resource, parse_list, write_list

GETOPT = "a:A:b:c:C:d:D:e:EfF:hi:Ij:J:k:K:l:L:m:M:nN:o:p:P:q:r:S:t:T:u:v:Vw:W:Xxz-:"
"""TORQUE 6.1 on Linux (GETOPT_ARGS in src/cmds/qsub_functions.c)."""
OURS = frozenset(("-vm", "--wait", "--explain", "--dry-run", "--json", "--debug", "--version", "--help", "-gf"))
HERE = "the command line"

quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
thorough = settings(quick, max_examples=100)

texts = st.text(st.characters(blacklist_characters="\0"), max_size=12)
values = texts | st.sampled_from(["", "-", "--", "-vm", "-h", "a b\nc", "x=1,y=2", "'", '"', "\udcff"])
letters = sorted(set(GETOPT) - {":", "-"})
with_value = [letter for letter in letters if f"{letter}:" in GETOPT]
flags = [letter for letter in letters if letter not in with_value]


def option(value: str, letter: str = "l") -> Option:
    return Option(letter, value, HERE)


# ------------------------------------------------------------ reading and writing back


class TestWrittenBack:
    """What was read and written back reads the same."""

    names = st.from_regex(r"\A[a-z][a-z0-9_.]{0,8}\Z")
    list_values = st.text(st.characters(blacklist_characters="\0'\"", blacklist_categories=("Cs",)), max_size=10)

    @thorough
    @given(st.lists(st.tuples(names, list_values), min_size=1, max_size=5))
    def test_resources_that_are_written(self, pairs: list[tuple[str, str]]) -> None:
        written = write_list([Resource(name, value, option("")) for name, value in pairs])
        assert [(item.name, item.value) for item in parse_list(option(written))] == pairs

    @thorough
    @given(st.text("ab=,'\"[] \t\n\x1c\xa01", max_size=24) | texts)
    def test_resources_that_are_read(self, text: str) -> None:
        try:
            items = parse_list(option(text))
            written = write_list(items)
        except VTorqueError as err:
            assert str(err).isprintable()
            return
        except ValueError:  # a value that can only stand in a -l of its own
            return
        again = parse_list(option(written))
        assert [(item.name, item.value) for item in again] == [(item.name, item.value) for item in items]
        assert write_list(again) == written

    words = st.from_regex(r"\A[a-z][a-z0-9=]{0,6}\Z").filter(lambda word: not word.startswith("ppn"))
    chunks = st.builds(
        lambda head, ppn, more: Chunk(head, (*([f"ppn={ppn}"] if ppn else []), *more)),
        st.integers(1, 99).map(str) | words,
        st.none() | st.integers(1, 64),
        st.lists(words, max_size=2),
    )
    nodes = st.builds(
        Nodes, st.lists(chunks, min_size=1, max_size=4).map(tuple), st.sampled_from(["", "#shared", "#excl", "#"])
    )

    @thorough
    @given(nodes, st.integers(1, 64))
    def test_nodes(self, nodes: Nodes, ppn: int) -> None:
        read = parse_nodes(str(nodes), option(""))
        assert read == nodes
        changed = read._replace(chunks=tuple(chunk.with_ppn(ppn) for chunk in read.chunks))
        assert parse_nodes(str(changed), option("")) == changed
        assert {chunk.ppn for chunk in changed.chunks} == {ppn} and changed.number == nodes.number

    @thorough
    @given(st.text("12ab:+=#ppn", max_size=16))
    def test_nodes_that_are_read(self, text: str) -> None:
        try:
            nodes = parse_nodes(text, option(""))
        except VTorqueError as err:
            assert str(err).isprintable()
            return
        assert str(nodes) == text and parse_nodes(str(nodes), option("")) == nodes

    settings_of_tasks = st.lists(
        st.tuples(
            st.sampled_from(["lprocs", "memory", "place", "usecores"]), st.none() | st.from_regex(r"\A[a-z0-9]{1,6}\Z")
        ),
        max_size=4,
    ).map(tuple)

    @thorough
    @given(st.builds(Tasks, st.integers(1, 99), settings_of_tasks))
    def test_tasks(self, tasks: Tasks) -> None:
        assert parse_tasks(str(tasks)) == tasks
        changed = tasks.with_setting("memory", "5mb")
        assert parse_tasks(str(changed)) == changed and changed.number == tasks.number

    @thorough
    @given(
        st.lists(
            st.sampled_from(flags).map(lambda letter: (letter, None)) | st.tuples(st.sampled_from(with_value), values),
            max_size=6,
        ),
        st.lists(values, max_size=2),
    )
    def test_option_vectors(self, pairs: list[tuple[str, Optional[str]]], operands: list[str]) -> None:
        options = tuple(Option(letter, value, HERE) for letter, value in pairs)
        assume(not any(item.letter == "v" and item.value == "m" for item in options))
        words = [word for item in options for word in item.argv()]
        line = parse_line([*words, "--", *operands])
        assert (line.options, line.operands, line.problem) == (options, tuple(operands), None)
        assert (line.vm, line.own, line.rest) == ((), frozenset(), (*words, "--", *operands))

    @thorough
    @given(st.from_regex(r"\A[A-Za-z_]{1,10}\Z"), st.text(st.characters(blacklist_characters="\0'\""), max_size=10))
    def test_attributes(self, name: str, value: str) -> None:
        blanks = " \t\n\v\f\r"
        assume(value.strip(blanks))
        (attribute,) = read_attributes((option(f"{name}={value}", "W"),))
        assert (attribute.name, attribute.value) == (name, value.strip(blanks))
        assert read_attributes((option(f"{name}={attribute.value}", "W"),))[0][:2] == attribute[:2]


# ------------------------------------------------------------ fitting


TREE: dict[str, Any] = {
    "vcpus": {"min": 1, "max": 8, "default": 1},
    "ram": {"min": 128, "max": 4096, "default": 512},
    "raise_requests": False,
    "grow_defaults": True,
}


@st.composite
def fittings(draw: st.DrawFn) -> dict[str, Any]:
    """A site, a request and what the job asks of its nodes."""
    low, high = sorted(draw(st.lists(st.integers(1, 16), min_size=2, max_size=2)))
    small, large = sorted(draw(st.lists(st.integers(64, 4096), min_size=2, max_size=2)))
    tree = {
        "vcpus": {"min": low, "max": high, "default": draw(st.integers(low, high))},
        "ram": {"min": small, "max": large, "default": draw(st.integers(small, large))},
        "raise_requests": draw(st.booleans()),
        "grow_defaults": draw(st.booleans()),
    }
    asked_for = {}
    if draw(st.booleans()):
        asked_for["vcpus"] = draw(st.integers(low, high))
    if draw(st.booleans()):
        asked_for["ram"] = draw(st.integers(small, large))
    form = draw(st.sampled_from(["open", "nodes", "nodes", "procs", "ncpus", "tasks"]))
    options = []
    if form == "nodes":
        parts = draw(
            st.lists(
                st.tuples(st.sampled_from(["1", "2", "n7"]), st.none() | st.integers(1, 40)), min_size=1, max_size=3
            )
        )
        options.append(option("nodes=" + "+".join(head if ppn is None else f"{head}:ppn={ppn}" for head, ppn in parts)))
    elif form in ("procs", "ncpus"):
        options.append(option(f"{form}={draw(st.integers(1, 40))}"))
    elif form == "tasks":
        lprocs = draw(st.none() | st.just("all") | st.integers(1, 40))
        size = draw(st.none() | st.integers(64, 9000))
        text = "tasks=1" + (f":lprocs={lprocs}" if lprocs else "") + (f":memory={size}mb" if size else "")
        options.append(option(text, "L"))
    if form != "tasks":
        for name in draw(st.lists(st.sampled_from(MEMORY), max_size=2, unique=True)):
            options.append(option(f"{name}={draw(st.integers(1, 9000))}mb"))
    return {
        "tree": tree,
        "asked_for": asked_for,
        "options": tuple(options),
        "per_node": draw(st.integers(1, 4)),
        "iocm": draw(st.none() | st.integers(0, 4).map(lambda cores: Iocm(cores, cores))),
        "unclot": draw(st.none() | st.integers(1, 512)),
        "host_cores": draw(st.integers(0, 4)),
        "host_memory": draw(st.integers(0, 512)),
        "least_ram": draw(st.integers(32, small)),
    }


class OfConfig:
    """The part of a configuration that fitting looks at."""

    def __init__(self, host_cores: int, host_memory: int) -> None:
        from vmgr.config import Resources

        self.resources = Resources(host_cores, host_memory, slots_are_cpus=False)
        self.components: dict[str, bool] = {}


class Case:
    """One case of fitting, with its own arithmetic."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        self.request = {key: Asked(value, HERE) for key, value in case["asked_for"].items()}
        self.policy = Policy(case["tree"], {}, lambda key: key)
        config: Any = OfConfig(case["host_cores"], case["host_memory"])
        self.checker = Checker(config, self.policy, dict.fromkeys(self.request, HERE))
        self.features = Features("auto", "overlay", None, (), "user", case["iocm"], False, case["unclot"])
        self.image = an_image(Path("/"))._replace(min_ram_mib=case["least_ram"])
        self.fixed_cores = case["host_cores"] + (case["iocm"].min_cores if case["iocm"] else 0)
        self.fixed_memory = case["host_memory"] + (case["unclot"] or 0)

    @property
    def group(self) -> GuestGroup:
        tree = self.case["tree"]
        number = {key: self.case["asked_for"].get(key, tree[key]["default"]) for key in ("vcpus", "ram")}
        return GuestGroup("micro", self.case["per_node"], number["vcpus"], number["ram"])

    def fit(self, options: tuple[Option, ...], group: Optional[GuestGroup] = None) -> tuple[HostRequest, Fitted]:
        asked = read_host_request(options)
        return asked, fit(group or self.group, self.features, asked, self.image, self.request, self.checker)

    def applied(self, options: tuple[Option, ...], fitted: Fitted) -> tuple[Option, ...]:
        """The options with what was fitted in place of what was asked."""
        names = {name for name, _ in fitted.memory} | ({"nodes", "procs", "ncpus"} if fitted.nodes else set())
        left = [item for item in options if (item.value or "").partition("=")[0] not in names]
        if fitted.tasks is not None:
            return (option(str(fitted.tasks), "L"),)
        more = [option(f"nodes={fitted.nodes}")] if fitted.nodes else []
        return (*left, *more, *(option(f"{name}={mib}mb") for name, mib in fitted.memory))


@settings(quick, max_examples=150)
@given(fittings())
def test_what_is_fitted_fits(drawn: dict[str, Any]) -> None:
    case = Case(drawn)
    tree, options = drawn["tree"], drawn["options"]
    try:
        asked, fitted = case.fit(options)
    except VTorqueError as err:
        assert not tree["raise_requests"]
        assert str(err).startswith("VT-RESOURCE") and str(err).isprintable()
        return
    group, given = fitted.group, drawn["asked_for"]
    assert group.vcpus == given.get("vcpus", group.vcpus) and group.ram_mib == given.get("ram", group.ram_mib)
    assert tree["vcpus"]["min"] <= group.vcpus <= tree["vcpus"]["max"]
    assert tree["ram"]["min"] <= group.ram_mib <= tree["ram"]["max"]
    if not tree["grow_defaults"]:
        assert group.vcpus <= case.group.vcpus and group.ram_mib <= case.group.ram_mib
    assert fitted.notes == () or tree["raise_requests"] or asked.form == "procs"
    after = read_host_request(case.applied(options, fitted))
    need = case.fixed_cores + group.vcpus * group.per_node
    if not (asked.tasks and asked.tasks.setting("lprocs") == "all"):
        assert all(need <= (chunk.ppn or 1) for chunk in after.nodes.chunks)
    needed = case.fixed_memory + group.ram_mib * group.per_node
    fewest = min(chunk.ppn or 1 for chunk in after.nodes.chunks)
    assert after.memory, "there is always a bound that the batch system knows"
    for name, amount in after.memory.items():
        mib = amount.amount >> 20
        assert needed <= (mib * fewest if name in PER_PROCESS else mib // after.nodes.number)
    if not fitted.notes:
        for name, amount in asked.memory.items():
            assert after.memory[name].amount == amount.amount
        assert [c.number for c in after.nodes.chunks] == [c.number for c in asked.nodes.chunks]
        for before, now in zip(asked.nodes.chunks, after.nodes.chunks):
            assert before.ppn in (None, now.ppn)


@settings(quick, max_examples=150)
@given(fittings())
def test_fitting_again_changes_nothing(drawn: dict[str, Any]) -> None:
    case = Case(drawn)
    try:
        _, fitted = case.fit(drawn["options"])
    except VTorqueError:
        return
    options = case.applied(drawn["options"], fitted)
    asked, again = case.fit(options, fitted.group)
    if any(name in PER_PROCESS for name, _ in fitted.memory):
        # raised to whole MiB for each process: a default RAM takes what is left over
        least = min(chunk.ppn or 1 for chunk in asked.nodes.chunks)
        assert fitted.group.ram_mib <= again.group.ram_mib < fitted.group.ram_mib + least
        again = again._replace(group=again.group._replace(ram_mib=fitted.group.ram_mib))
    assert (again.nodes, again.tasks or fitted.tasks, again.notes) == (None, fitted.tasks, ())
    assert again.memory == ()
    assert again.group == fitted.group


# ------------------------------------------------------------ what qsub would understand


def expected_options(words: list[str]) -> Optional[tuple[list[tuple[str, Optional[str]]], list[str]]]:
    """What getopt makes of a command line; None for what it refuses. `-vm` and our words have been taken out."""
    try:
        # Python's getopt takes `--x` for a long option, and TORQUE's refuses it
        pairs, operands = getopt.gnu_getopt(words, GETOPT.removesuffix("-:"), [])
    except getopt.GetoptError:
        return None
    return [(name[1:], value if f"{name[1:]}:" in GETOPT else None) for name, value in pairs], operands


lines = st.lists(
    values
    | st.builds("-{}{}".format, st.text(GETOPT.replace(":", ""), min_size=1, max_size=3), texts)
    | st.sampled_from([f"-{letter}" for letter in letters]),
    max_size=6,
)


@settings(quick, max_examples=150)
@given(lines)
def test_options_as_getopt_reads_them(words: list[str]) -> None:
    assume(not OURS & set(words))
    line = parse_line(words)
    expected = expected_options(words)
    if expected is None:
        assert line.problem is not None
        return
    pairs, operands = expected
    assert [(item.letter, item.value) for item in line.options] == pairs
    assert list(line.operands) == operands
    attached_prefix = any(re.match("-[EfhInVXxz]*C.", word) for word in words)
    assert line.problem is None or attached_prefix


def modelled_directives(script: bytes, prefix: bytes) -> Optional[list[bytes]]:
    """The text of each directive as qsub goes over a script, line by line; None where qsub gives up."""
    if not prefix:
        return []
    found = []
    stream = io.BytesIO(script.replace(b"\r\n", b"\n"))
    while line := stream.readline():
        head = line.lstrip(b" \t\n\v\f\r")
        if head.startswith(prefix):
            text = head[len(prefix) :]
            while text.endswith(b"\\\n"):
                more = stream.readline()
                if not more:
                    return None
                text = text[:-2] + more
            found.append(text)
        elif head and not head.startswith(b"#") and not line.startswith(b":"):
            break
    return found


def modelled_words(text: bytes) -> Optional[list[bytes]]:
    """The words of a directive: a shell's quotes without variables; None for a quote that stays open."""
    words: list[bytes] = []
    pattern = re.compile(rb"\s+|\\(.?)|'([^']*)'|\"([^\"]*)\"|(['\"])|([^\s\\'\"])", re.DOTALL)
    word: Optional[bytes] = None
    for match in pattern.finditer(text.partition(b"\0")[0]):
        if match[4]:
            return None
        pieces = [piece for piece in (match[1], match[2], match[3], match[5]) if piece is not None]
        if pieces:
            word = (word or b"") + pieces[0]
        elif word is not None:
            words.append(word)
            word = None
    return words if word is None else [*words, word]


script_lines = st.lists(
    st.sampled_from(
        [b"", b" ", b"#", b"#PBS", b"#PBS ", b" #PBS ", b"#!/bin/sh", b":", b" :", b"true", b"\\", b"-q ", b"'"]
    )
    | st.binary(max_size=6)
    | st.sampled_from([b"-N a b", b"-A 'x y'", b"-A \\'", b"\r", b"-h\\", b"\n", b"-l a=1", b"-q "]),
    max_size=14,
).map(lambda parts: b"".join(part + (b"\n" if len(part) % 3 == 0 else b"") for part in parts))


@settings(quick, max_examples=150)
@given(script_lines, st.sampled_from(["#PBS", "#P", ""]))
def test_directives_as_a_model_reads_them(script: bytes, prefix: str) -> None:
    texts = modelled_directives(script, prefix.encode())
    split = None if texts is None else [modelled_words(text) for text in texts]
    try:
        line = read_directives(script, prefix, "job")
    except VTorqueError as err:
        assert str(err).startswith("VT-USAGE") and str(err).isprintable()
        assert split is None or None in split or any(words and words[-1] == b"-vm" for words in split if words)
        return
    assert split is not None and None not in split
    expected: list[tuple[str, Optional[str]]] = []
    for words in split:
        decoded = [os.fsdecode(word) for word in words or []]
        found = expected_options([word for word in decoded if word != "-vm"])
        if "-vm" in decoded or found is None:
            return
        expected += found[0]
    assert [(item.letter, item.value) for item in line.options] == expected


# ------------------------------------------------------------ no input is a fault


def check_outcome(site: Site, status: int, out: str, err: str) -> None:
    """Submitted, or refused by name with nothing left; never a fault."""
    assert "Traceback" not in err and "VT-INTERNAL" not in err
    if status != 0:
        assert re.match(r"vsub: VT-[A-Z]+: ", err.splitlines()[-1]) and out == ""
        assert status == 2 and not site.called and site.left_in_home() == []


def clean(site: Site) -> None:
    """As before a submission."""
    import shutil

    shutil.rmtree(site.home / ".vtorque", ignore_errors=True)
    shutil.rmtree(site.record / "submitted", ignore_errors=True)
    (site.record / "argv").unlink(missing_ok=True)


guest_words = st.lists(
    values
    | st.sampled_from(["-vm", "job.sh", "vcpus=2", "-l", "-W", "-t", "-L", "-F", "-S", "-C"])
    | st.builds(
        "{}={}".format, st.sampled_from(["img", "vcpus", "ram", "vm_prologue", "mounts", "iocm", "disk"]), texts
    )
    | st.builds("-{}{}".format, st.sampled_from(letters), texts),
    max_size=5,
)


@settings(quick, max_examples=50)
@given(words=guest_words, script=script_lines | st.binary(max_size=40))
def test_any_command_line_and_script(site: Site, vsub_run: Runner, words: list[str], script: bytes) -> None:
    assume(not {"--version", "--help", "--wait", "--about", "--debug", "-I", "-x"} & set(words))
    (site.work / "job.sh").write_bytes(script)
    clean(site)
    line = None
    try:
        line = parse_line(["-vm", "vcpus=1", *words])
    except VTorqueError:
        pass
    assume(line is None or not (line.last("I") or "--about" in line.rest))
    assume(line is None or not any(item.value == "off" for item in line.vm[1:]))
    stdin = site.base / "stdin"
    stdin.write_bytes(script)
    with standard_input(stdin):
        status, out, err = vsub_run("-vm", "vcpus=1", *words)
    check_outcome(site, status, out, err)
    if status == 0:
        assert line is not None
        argv = site.argv
        assert argv[:2] == ["-C", ""] and argv[-1] == "DIR/job"
        expected = expected_options(list(line.rest))
        assert expected is not None
        kept = [pair for pair in expected[0] if pair[0] not in "lLCSFz"]
        given_to_qsub = getopt.gnu_getopt(argv, GETOPT.removesuffix("-:"), [])[0]
        pairs = [(name[1:], value if f"{name[1:]}:" in GETOPT else None) for name, value in given_to_qsub]
        assert [pair for pair in pairs if pair[0] not in "lLCSFz"][-len(kept) :] == kept or not kept


yaml_bytes = st.binary(max_size=60) | st.text("ab01:-[]{}&*!|>?'\"#%@, \n\t", max_size=60).map(str.encode)


@settings(quick, max_examples=40)
@given(data=yaml_bytes, key=st.sampled_from(["vcpu_pinning", "metadata"]))
def test_any_yaml_of_the_users(site: Site, vsub_run: Runner, data: bytes, key: str) -> None:
    site.configure("policy: {img: {default: debian-12}, metadata: {allowed: [a, b, ab]}}\n")
    site.script()
    clean(site)
    (site.work / "file").write_bytes(data)
    check_outcome(site, *vsub_run("-vm", f"{key}=file", "job.sh"))


KEYS = ["nodes", "img", "vcpus", "ram", "vms_per_node", "vcpu_pinning", "mounts", "metadata", "raise_requests", "disk"]
leaves = st.dictionaries(
    st.sampled_from(["min", "max", "default", "allowed", "enabled"]),
    st.integers(-1, 9) | st.booleans() | st.none() | st.sampled_from(["1G", "micro", "auto", "off", ["home"], []]),
    max_size=3,
)
overrides = st.dictionaries(st.sampled_from(KEYS), leaves | st.booleans() | st.none(), max_size=3)


@settings(quick, max_examples=40)
@given(
    tree=st.fixed_dictionaries(
        {}, optional={layer: st.dictionaries(st.sampled_from(["carol", "users", "q"]), overrides, max_size=2)
                      for layer in ("queues", "groups", "users")}
    )
)  # fmt: skip
def test_any_override_of_the_policy(site: Site, vsub_run: Runner, tree: dict[str, Any]) -> None:
    import json

    site.configure(f"policy: {json.dumps({'img': {'default': 'micro'}, **tree})}\n")
    site.script()
    clean(site)
    check_outcome(site, *vsub_run("-q", "q", "job.sh"))


@thorough
@given(texts | st.from_regex(r"\A[0-9]{1,4}[kmgtpKMGTP]?[bwBW]?\Z"))
def test_any_size(text: str) -> None:
    size = parse_size(text)
    assert size is None or size >= 0
