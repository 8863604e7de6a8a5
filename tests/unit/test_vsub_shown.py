"""`--explain`, `--dry-run` and `--json` of a guest job, exactly; nothing is submitted, and nothing is left."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from vsubsite import Runner, Site

from vmgr.jobspec import parse_spec

LINE = ["-q", "a", "-l", "nodes=1:ppn=1", "-vm", "ram=768M", "-F", "a b", "job.sh"]
CONFIG = "policy: {img: {default: micro}, vcpus: {max: 8, default: 2}, users: {carol: {network: {default: user}}}}\n"
DEFAULT = "default (the built-in default)"

EXPLAINED = f"""\
img               micro                                     default (<config> line 3)
vcpus             1                                         default (<config> line 3; fitted to the image and to what the job asks of its nodes)
ram               768M                                      the command line
vms_per_node      1                                         {DEFAULT}
vcpu_pinning      off                                       job.sh line 3
fs_type           overlay                                   {DEFAULT}
network           user                                      default (<config> line 3, policy.users.carol.network.default)
mounts            home+opt-hpc                              {DEFAULT}
suspend           false                                     {DEFAULT}
iocm              false                                     {DEFAULT}
vrdma             false                                     {DEFAULT}
unclot            false                                     {DEFAULT}
-N                x                                         job.sh line 2
-q                a                                         the command line
-F                a b                                       the command line
-l walltime       60                                        job.sh line 2
-l nodes          1:ppn=1                                   the command line
-l mem            1024mb                                    what the guests need
-l naccesspolicy  uniqueuser                                the built-in default
directory         <work>  where you are
"""  # noqa: E501 (as it is printed)

ARGV = [
    "<qsub>", "-C", "", "-l", "prologue=DIR/prologue", "-S", "PREFIX/libexec/vtorque-job", "-N", "x",
    "-l", "walltime=60", "-q", "a", "-l", "nodes=1:ppn=1", "-l", "mem=1024mb",
    "-l", "naccesspolicy=uniqueuser", "DIR/job",
]  # fmt: skip

DRY = """\
<qsub> -C '' -l prologue=DIR/prologue -S PREFIX/libexec/vtorque-job -N x -l walltime=60 -q a -l nodes=1:ppn=1 \
-l mem=1024mb -l naccesspolicy=uniqueuser DIR/job

DIR/job (0700, SIZE bytes)
    #!/bin/sh
    exec PREFIX/libexec/vtorque-job DIR "$@"

DIR/key (0600, SIZE bytes)
    not shown: made anew for each submission

DIR/key.pub (0600, SIZE bytes)
    KEY

DIR/prologue (0700, SIZE bytes)
    #!/bin/sh
    exec PREFIX/libexec/vtorque-user-prologue "$@"

DIR/script (0700, 72 bytes)
    #!/bin/sh
    #PBS -N x -l walltime=60
    #PBS -vm vcpu_pinning=off
    echo hello

DIR/spec.json (0600, SIZE bytes)
    SPEC
"""


@pytest.fixture
def shown(site: Site, vsub_run: Runner) -> Any:
    """Runs vsub with the line of these tests; gives what it printed, with what is made anew each time written as words.

    Nothing may have been submitted, nothing may have been written.
    """
    site.configure(CONFIG)
    site.script("#!/bin/sh\n#PBS -N x -l walltime=60\n#PBS -vm vcpu_pinning=off\necho hello\n")

    def run(*words: str) -> str:
        status, out, err = vsub_run(*words, *LINE)
        assert (status, err) == (0, "")
        assert not site.called and site.left_in_home() == []
        out = re.sub(rf"{re.escape(str(site.home))}/\.vtorque/[0-9a-z]{{16}}/[0-9a-f]{{64}}", "DIR", out)
        known = {site.install.config: "<config>", site.work: "<work>", site.qsub: "<qsub>", site.install.root: "PREFIX"}
        for path, word in known.items():
            out = out.replace(str(path), word)
        return out

    return run


def test_explain(shown: Any) -> None:
    assert shown("--explain") == EXPLAINED


def test_explain_for_programs(shown: Any) -> None:
    tree = json.loads(shown("--explain", "--json"))
    rows = (re.split(r" {2,}", line) for line in EXPLAINED.splitlines())
    assert tree == {"guest": True, "values": {key: {"value": value, "source": source} for key, value, source in rows}}


@pytest.mark.parametrize("word", ["--dry-run", "-gf"])
def test_dry_run(shown: Any, word: str) -> None:
    out = shown(word)
    out = re.sub(r"ssh-ed25519 [A-Za-z0-9+/=]{68} vtorque-[0-9a-z]{16}", "KEY", out)
    out = re.sub(r"    \{.*\}\n", "    SPEC\n", out)
    out = re.sub(r"(/(?:job|key|key.pub|prologue|spec.json) \(0[67]00), [0-9]+ bytes", r"\1, SIZE bytes", out)
    assert out == DRY


def test_dry_run_for_programs(site: Site, vsub_run: Runner, shown: Any) -> None:
    status, out, _ = vsub_run("--dry-run", "--json", *LINE)
    tree = json.loads(out)
    assert (status, site.called, site.left_in_home()) == (0, False, [])
    assert set(tree) == {"guest", "values", "argv", "files"}
    directory = tree["argv"][-1].removesuffix("/job")
    assert re.fullmatch(rf"{re.escape(str(site.home))}/\.vtorque/[0-9a-z]{{16}}/[0-9a-f]{{64}}", directory)
    known = {str(site.qsub): "<qsub>", str(site.install.root): "PREFIX", directory: "DIR"}
    argv = tree["argv"]
    for path, word in known.items():
        argv = [text.replace(path, word) for text in argv]
    assert argv == ARGV
    files = {file["path"].removeprefix(f"{directory}/"): file for file in tree["files"]}
    assert {name: file["mode"] for name, file in files.items()} == {
        "job": "0700", "key": "0600", "key.pub": "0600", "prologue": "0700", "script": "0700", "spec.json": "0600",
    }  # fmt: skip
    assert files["key"]["content"] is None and files["key"]["size"] > 300
    assert all(file["size"] == len(file["content"].encode()) for name, file in files.items() if name != "key")
    spec = parse_spec(files["spec.json"]["content"].encode(), sha256=directory.rpartition("/")[2], source="spec.json")
    assert (spec.asked, spec.arguments, spec.groups[0].ram_mib) == (("ram", "vcpu_pinning"), "a b", 768)


def test_submission_for_programs(site: Site, vsub_run: Runner, shown: Any) -> None:
    status, out, err = vsub_run("--json", *LINE)
    assert (status, err) == (0, "")
    tree = json.loads(out)
    assert tree == {
        "job": "12.host",
        "guest": True,
        "status": 0,
        "directory": str(site.directory),
        "argv": [str(site.qsub), *site.argv_raw],
    }


def test_refusal_by_qsub_for_programs(site: Site, vsub_run: Runner, shown: Any) -> None:
    site.answer(stderr="qsub: no\n", status=188)
    status, out, err = vsub_run("--json", *LINE)
    assert (status, err, site.left_in_home()) == (188, "qsub: no\n", [])
    tree = json.loads(out)
    assert (tree["job"], tree["status"], tree["directory"]) == (None, 188, None)


def test_what_was_changed_is_named(site: Site, vsub_run: Runner, shown: Any) -> None:
    site.configure("policy: {img: {default: micro}, raise_requests: true}\n")
    out = vsub_run("--explain", "-l", "nodes=1:ppn=1,mem=300mb", "-vm", "vcpus=2", "job.sh").stdout
    assert "-l nodes          1:ppn=2" in out and "-l mem            384mb" in out
    assert "what the guests need, in place of 1:ppn=1 (the command line)\n" in out
    assert "what the guests need, in place of 300mb (the command line)\n" in out


def test_what_was_changed_to_another_form_is_named(site: Site, vsub_run: Runner, shown: Any) -> None:
    out = vsub_run("--explain", "-l", "procs=2", "job.sh").stdout
    assert "what the guests need, in place of procs=2 (the command line)\n" in out
