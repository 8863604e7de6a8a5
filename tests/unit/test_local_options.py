"""The embedded batch system's reading of command lines, directives, resources and messages."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsub.engines.local import attributes, job, options, protocol, resources, submission
from vsub.engines.local.options import Options, UsageError
from vsub.engines.local.process import Mark


def parsed(*arguments: str) -> Options:
    return options.parse(list(arguments))[0]


def test_options() -> None:
    found, operands = options.parse(
        ["-N", "a", "-lnodes=2:ppn=3,walltime=90", "job.sh", "-l", "mem=1GB", "-Vz", "-j", "oe", "-W", "umask=22"]
    )
    assert operands == ["job.sh"]
    assert found.resources == (("nodes", "2:ppn=3"), ("walltime", "00:01:30"), ("mem", "1gb"))
    assert (found.name, found.join, found.umask, found.all_variables, found.silent) == ("a", "oe", 0o22, True, True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-E"], "-E"),
        (["-M", "a@b"], "-M"),
        (["-m", "abe"], "-m abe"),
        (["-c", "enabled"], "-c"),
        (["-t", ""], "-t"),
        (["-T", "a/b"], "-T"),
        (["-p", "1024"], "-p"),
        (["-p", "x"], "-p"),
        (["-r", "yes"], "-r"),
        (["-a", "2460"], "-a"),
        (["--help"], "--help"),
        (["-W", "depend=on:1"], "on is not supported"),
        (["-W", "depend=afterok"], "dependency value: 'afterok'"),
        (["-W", "depend=afterok:x"], "dependency"),
        (["-W", "stagein=x"], "stagein"),
        (["-W", "umask=9"], "umask=9"),
        (["-W", "umask=022,depend=afterok:1"], "umask=022,depend"),
        (["-N"], "-N"),
        (["-N", "a b"], "-N"),
        (["-N", "a/b"], "-N"),
        (["-j", "x"], "-j"),
        (["-k", "x"], "-k"),
        (["-l", "x"], "-l"),
        (["-l", "foo=1"], "foo"),
        (["-l", "mem=1zb"], "1zb"),
        (["-l", "nodes=0"], "nodes"),
        (["-l", 'other="a'], "unmatched"),
        (["-v", "=1"], "-v"),
        (["-S", "bash"], "-S"),
    ],
)
def test_refused_by_name(arguments: list[str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        options.parse(arguments)


def test_directives_end_at_the_first_command() -> None:
    script = "#!/bin/sh\n# talk\n#PBS -N a\n\n  # more\n#PBSx -N b\n#PBS\n#PBS -q long # why\necho\n#PBS -N c\n"
    assert options.directives(script) == [(3, "-N a"), (7, ""), (8, "-q long # why")]
    found = options.parse_script(script)
    assert (found.name, found.queue) == ("a", "long")


def test_later_directive_counts_and_the_command_line_most() -> None:
    script = options.parse_script("#PBS -N a -l walltime=1,mem=1mb -v A=1 -v B=1\n#PBS -N b -l file=1kb,walltime=2\n")
    assert (script.name, script.variables) == ("b", (("B", "1"),))
    assert script.resources == (("walltime", "00:00:02"), ("mem", "1mb"), ("file", "1kb"))
    merged = options.merge(parsed("-N", "c", "-l", "prologue=/p,mem=2mb", "-v", "B=2"), script)
    assert merged.name == "c"
    assert merged.resources == (("prologue", "/p"), ("mem", "2mb"), ("walltime", "00:00:02"), ("file", "1kb"))
    assert merged.variables == (("B", "2"),)


def test_error_in_a_directive_names_the_line() -> None:
    with pytest.raises(UsageError, match="line 2: #PBS -m abe: option -m"):
        options.parse_script("#!/bin/sh\n#PBS -m abe\n")
    with pytest.raises(UsageError, match="line 1"):
        options.parse_script('#PBS -N "a\n')


def test_variables() -> None:
    environment = {"HOME": "/h", "BASH_FUNC_x%%": "() { :; }"}
    found = options.script_variables(parsed("-v", "A='1,2',B=\\,,HOME,NONE"), environment)
    assert found == {"A": "1,2", "B": ",", "HOME": "/h", "NONE": ""}
    assert options.script_variables(parsed("-V"), environment) == environment


@pytest.mark.parametrize(
    ("text", "value"), [("5", 5), ("1:05", 65), ("2:00:00", 7200), ("100:00:00", 360000), ("7.9", 7)]
)
def test_times(text: str, value: int) -> None:
    assert resources.seconds(text) == value


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4", "-1", "1:", "٣"])
def test_bad_times(text: str) -> None:
    with pytest.raises(ValueError, match="not a time"):
        resources.seconds(text)


@pytest.mark.parametrize(("text", "value"), [("5", 5), ("1kb", 1024), ("2GB", 2 << 30), ("1w", 8), ("1kw", 8192)])
def test_sizes(text: str, value: int) -> None:
    assert resources.size_bytes(text) == value


def test_bounded_list_drops_whole_items_in_order() -> None:
    items = [("prologue", "/p"), ("other", "x" * 2030), ("mem", "1mb"), ("software", "y" * 100)]
    text = resources.bounded(items)
    assert text == f"prologue=/p,mem=1mb,software={'y' * 100}"
    assert resources.bounded([("other", "x" * 2039)]) == "other=" + "x" * 2039
    assert resources.bounded([("other", "x" * 2040)]) == ""


@given(st.lists(st.tuples(st.sampled_from(sorted(resources.TEXTS)), st.text(max_size=900)), max_size=12))
def test_bounded_list_is_bounded(items: list[tuple[str, str]]) -> None:
    text = resources.bounded(items)
    assert len(text.encode("utf-8", "surrogateescape")) < resources.MAX_LIST
    if items and len(items[0][1].encode("utf-8", "surrogatepass")) < 1000:
        assert text.startswith(f"{items[0][0]}=")


def test_nodes() -> None:
    request = resources.NodeRequest.parse("2:ppn=4+1:ppn=2")
    assert (request.nodes, request.ppn) == (3, 4)
    assert resources.NodeRequest.parse("host7:ppn=2").nodes == 0


@given(st.text(max_size=300))
def test_no_directive_line_surprises(text: str) -> None:
    try:
        options.parse_script(f"#PBS {text}\n")
    except UsageError as error:
        assert str(error).startswith("directive error: line 1")


@given(st.lists(st.text(max_size=30), max_size=6))
def test_no_command_line_surprises(arguments: list[str]) -> None:
    try:
        options.parse(arguments)
    except UsageError:
        pass


@given(st.binary(max_size=400))
def test_no_bytes_surprise_the_protocol(data: bytes) -> None:
    try:
        assert isinstance(protocol.decode(data), dict)
    except protocol.ProtocolError:
        pass


@given(st.dictionaries(st.text(), st.text() | st.integers(-(10**15), 10**15) | st.none()))
def test_messages_come_back(message: dict[str, object]) -> None:
    line = protocol.encode(message)
    assert line.count(b"\n") == 1
    assert protocol.decode(line) == message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(sorted(submission.Submission.__dataclass_fields__)), json_values))
def test_no_submission_surprises(message: dict[str, object]) -> None:
    with pytest.raises(protocol.Refused):
        submission.Submission.read(message)


def test_jobs_are_stored_whole() -> None:
    asked = submission.Submission(
        "n", "", "batch", (("nodes", "1"),), {"A": "\udc80"}, "/", None, "/o", "/e", "n", "n", None, 0o77, ""
    )
    owner = submission.Account("u", 5, 6, "g", (6, 7), "/h", "/bin/sh")
    before = job.Job("3.h", 3, owner, asked, 1.5, marks=[Mark(1, 2, "b", 3)])
    assert job.Job.from_json(json.loads(json.dumps(before.to_json()))) == before


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("5", "5.h.org"),
        ("5.h", "5.h.org"),
        ("5.h.org", "5.h.org"),
        ("5.x", "5.x"),
        ("x", None),
        ("5/..", None),
        ("", None),
    ],
)
def test_job_ids(text: str, full: object) -> None:
    assert attributes.full_id(text, "h.org") == full
