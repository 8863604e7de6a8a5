"""`install.sh` over a cluster: three nodes with file systems, addresses and SSH daemons of their own, real pdsh.

The node n1 sees the front end's prefix, n2 and n3 do not.
"""

from __future__ import annotations

import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import psutil
import pytest
from installsite import MOM_CONFIG, REPOSITORY, SITE_HOOKS, SSHD, Cluster, picture

from vmgr import __version__
from vmgr.deploy import build, tree
from vmgr.deploy.build import PARTS
from vmgr.deploy.hookfiles import is_ours
from vmgr.deploy.places import LINKED

pytestmark = [
    pytest.mark.skipif(not SSHD.exists() or shutil.which("pdsh") is None, reason="needs sshd and pdsh"),
    pytest.mark.timeout(300),
]

CONFIG = """\
engine: torque
submit: {job_type: vtorque}
timeouts: {barrier: 240, disk: 100}
"""
NEEDED_S = 251


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A front end with vTorque and three nodes without, of which n3 is down."""
    word = secrets.token_hex(3)
    base, prefix = Path(f"/dev/shm/vtorque-test-{word}"), Path(f"/opt/vtorque-test-{word}")
    base.mkdir(mode=0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    made = Cluster(base, prefix)
    try:
        (base / "site.yaml").write_text(CONFIG)
        made.add("n1", own_prefix=False)
        made.add("n2", own_prefix=True)
        made.add("n3", own_prefix=True, hooks=False)
        made.nodes["n1"].start()
        made.nodes["n2"].start()
        BEFORE.update(made.picture())
        made.install("--config", str(base / "site.yaml"))
        yield made
    finally:
        for node in made.nodes.values():
            node.remove()
        shutil.rmtree(prefix, ignore_errors=True)
        shutil.rmtree(base, ignore_errors=True)


BEFORE: dict[str, object] = {}
"""The cluster before anything was installed."""


@pytest.fixture(autouse=True)
def nodes_as_they_were(cluster: Cluster) -> Iterator[None]:
    """Each test leaves the nodes as they were before anything was installed, file by file."""
    yield
    if (cluster.prefix / ".install" / "nodes.json").exists():
        cluster.install("--uninstall", "--nodes", "n[1-2]", "--torque-home", "/var/spool/torque")
    for name, node in cluster.nodes.items():
        assert node.picture() == BEFORE[name], name
    assert not leftovers(cluster), "no process of an installation stays"


def leftovers(cluster: Cluster) -> list[str]:
    """Remote shells to the nodes that still run."""
    started = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [line for line in started if f"{cluster.base}/ssh" in line and "/sshd" not in line]


def lines(text: str) -> dict[str, str]:
    """What was printed of each node."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"(n[0-9])\s\s?(.*)", line)
        if match:
            assert match[1] not in found, f"one line a node: {text}"
            found[match[1]] = match[2]
    return found


# --- the front end


def test_the_front_end(cluster: Cluster) -> None:
    prefix = cluster.prefix
    assert subprocess.run([str(prefix / "bin" / "vmgr"), "--version"], check=True, capture_output=True).stdout
    local = cluster.base / "local"
    for name in ("vsub", "vmgr"):
        assert (local / "bin" / name).readlink() == prefix / "bin" / name
        assert (local / "share" / "man" / "man1" / f"{name}.1").read_text().startswith(".")
    assert "vmgr" in (local / "share" / "bash-completion" / "completions" / "vmgr").read_text()
    snippet = cluster.base / "profile" / "vtorque.sh"
    shown = f'PATH=/usr/bin:/bin; . {snippet}; . {snippet}; echo "$PATH"'
    done = subprocess.run(["sh", "-euc", shown], capture_output=True, text=True, check=True)
    assert done.stdout == f"/usr/bin:/bin:{prefix}/bin\n"
    wrong = [path for path in prefix.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022]
    wrong += [path for path in prefix.rglob("*") if path.lstat().st_uid or path.lstat().st_gid]
    assert not wrong, wrong[:5]
    assert (prefix / "etc" / "vtorque" / "vtorque.yaml").read_text() == CONFIG
    before = picture(prefix)
    assert "kept:" not in cluster.install() and picture(prefix) == before, "a second time changes nothing"
    assert "all as installed" in cluster.install("--check")


REFUSED = [
    ("VT-VALUE: --nodes n[1", "--nodes", "n[1"),
    ("exclude each other", "--nodes", "n1", "--all"),
    ("exclude each other", "--check", "--uninstall"),
    ("wrap or jobtype", "--hooks", "some"),
    ("1 to 512", "--fanout", "0"),
    ("invalid int value", "--fanout", "x"),
    ("cannot be read", "--wheels", "/no/such"),
    ("see ./install.sh --help", "--what"),
    ("an absolute path", "--torque-home", "relative"),
    ("VT-ENGINE: --all", "--all", "--torque-home", "/nowhere"),
]


def test_refused_with_one_line(cluster: Cluster) -> None:
    before = picture(cluster.prefix)
    for said, *words in REFUSED:
        told = cluster.install(*words, status=2)
        assert said in told and told.count("\n") == 1, words
    assert picture(cluster.prefix) == before


def test_it_asks_on_a_terminal_only(cluster: Cluster) -> None:
    before = picture(cluster.prefix)
    for answer in ("n", ""):
        program, *words = cluster.command("--uninstall")
        asked = pexpect.spawn(program, words, env=cluster.environment(), encoding="utf-8", timeout=60)
        asked.expect(re.escape(f"take vTorque away from {cluster.prefix} and 0 nodes? [y/N] "))
        asked.sendline(answer)
        asked.expect(pexpect.EOF)
        asked.close()
        assert asked.exitstatus == 1 and picture(cluster.prefix) == before
    program, *words = cluster.command("--yes", "--nodes", "n1")
    asked = pexpect.spawn(program, words, env=cluster.environment(), encoding="utf-8", timeout=60)
    asked.expect("1 of 1 nodes done")
    asked.expect(pexpect.EOF)
    asked.close()
    assert asked.exitstatus == 0 and "y/N" not in str(asked.before)


# --- nodes


def test_nodes_one_of_which_is_down(cluster: Cluster) -> None:
    n3 = cluster.nodes["n3"]
    told = cluster.install("--nodes", "n[1-3]", "--prologalarm", "raise", status=1)
    found = lines(told)
    assert found["n1"].startswith("installed, hooks wrap, prefix shared, moved aside: epilogue, "), told
    assert found["n2"].startswith("installed, hooks wrap, prefix of its own"), told
    assert "FAILED: ssh: connect to host 198.18." in found["n3"] and "No route" in found["n3"], told
    assert told.splitlines()[-1] == "2 of 3 nodes done, not done: n3; the same command does them later"
    for name in ("n1", "n2"):
        mom_priv = cluster.nodes[name].mom_priv
        assert all(is_ours((mom_priv / hook).read_bytes()) for hook in SITE_HOOKS)
        assert f"$prologalarm {NEEDED_S}  # enough" in (mom_priv / "config").read_text()
    own = cluster.nodes["n2"].base / "opt" / cluster.prefix.name
    assert (own / "current").readlink() == (cluster.prefix / "current").readlink()
    assert (own / "etc" / "vtorque" / "vtorque.yaml").read_text() == CONFIG
    assert (own / "etc" / "vtorque" / "vtorque.yaml.compiled").exists()

    found = lines(cluster.install("--check", status=1))
    assert found["n1"].endswith("all as installed") and found["n2"].endswith("all as installed")
    n3.start()
    found = lines(cluster.install("--nodes", "n[1-3]", "--prologalarm", "raise"))
    assert found["n1"].startswith("is current") and found["n2"].startswith("is current"), found
    assert found["n3"].startswith(
        "installed, hooks wrap, prefix of its own, moved aside: no hook, $prologalarm raised"
    ), found
    told = cluster.install("--check")
    assert told.splitlines()[-1] == "3 of 3 nodes done" and set(lines(told)) == {"n1", "n2", "n3"}

    (n3.mom_priv / "prologue").chmod(0o775)
    found = lines(cluster.install("--check", "--nodes", "n[2-3]", status=1))
    assert "PROBLEMS: " in found["n3"] and "mode 0775, not 0:0 and 0755" in found["n3"], found
    cluster.install("--nodes", "n3")
    assert "all as installed" in lines(cluster.install("--check", "--nodes", "n3"))["n3"]
    cluster.install("--uninstall", "--nodes", "n3")
    n3.stop()


def test_clush_job_types_and_answers(cluster: Cluster) -> None:
    """ClusterShell's clush in place of pdsh; options from a file; a dry run that changes nothing."""
    answers = cluster.base / "answers.yaml"
    via = "clush" if shutil.which("clush") else "pdsh"
    answers.write_text(f"# of the site\nnodes: n[1-2]\nhooks: jobtype\nvia: {via}\nfanout: 1\n")
    before = cluster.picture(), picture(cluster.prefix)
    found = lines(cluster.install("--answers", str(answers), "--dry-run"))
    assert "would be changed" in found["n1"] and "would be changed" in found["n2"], found
    assert (cluster.picture(), picture(cluster.prefix)) == before
    found = lines(cluster.install("--answers", str(answers)))
    assert found["n1"].startswith("installed, hooks jobtype") and "$prologalarm is 120 s" in found["n1"], found
    theirs = cluster.nodes["n1"].mom_priv / "prologue"
    assert not is_ours(theirs.read_bytes()) and is_ours(theirs.with_name("prologue.vtorque").read_bytes())
    assert lines(cluster.install("--check", "--via", via, status=1))["n2"].startswith("PROBLEMS: $prologalarm")

    config = cluster.prefix / "etc" / "vtorque" / "vtorque.yaml"
    config.write_text(CONFIG.replace("job_type: vtorque", "job_type: null"))
    try:
        told = cluster.install("--nodes", "n1", "--hooks", "jobtype", status=2)
        assert "need submit.job_type" in told
    finally:
        config.write_text(CONFIG)


def test_all_nodes_of_the_batch_system(cluster: Cluster) -> None:
    server = cluster.base / "server"
    (server / "server_priv").mkdir(parents=True)
    (server / "server_priv" / "nodes").write_text("# nodes\nn2 np=4 fast\n\nn1 np=2\n")
    if shutil.which("pbsnodes"):
        pytest.skip("there is a batch system here")
    told = cluster.install("--all", "--torque-home", str(server), status=1)
    assert all("FAILED: there is no" in line and "--torque-home" in line for line in lines(told).values()), told
    assert set(lines(told)) == {"n1", "n2"}
    cluster.install("--forget", "n[1-2]")


def test_killed_while_nodes_are_done(cluster: Cluster) -> None:
    """After each line that it prints; the same command completes it, or the opposite one undoes it."""
    for number in range(3):
        child = subprocess.Popen(
            cluster.command("--nodes", "n[1-2]", "--fanout", "1"),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True,
            env={**cluster.environment(), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert child.stdout is not None
        for _ in range(number + 1):
            assert child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.stdout.close()
        child.wait()
        if number % 2:
            cluster.install("--uninstall", "--nodes", "n[1-2]")
            assert all(cluster.nodes[name].picture() == BEFORE[name] for name in ("n1", "n2"))
        else:
            assert cluster.install("--nodes", "n[1-2]").splitlines()[-1] == "2 of 2 nodes done"
            cluster.install("--check", "--nodes", "n[1-2]", status=1)


# --- Slurm


def test_nodes_of_slurm(cluster: Cluster) -> None:
    """The commands of docs/slurm.md, on a site that has two nodes and a slurm.conf; no daemon runs."""
    text = (REPOSITORY / "docs" / "slurm.md").read_text()
    shown = re.findall(
        r"^# \./install\.sh(.*)$", "".join(re.findall(r"^```console\n(.*?)^```$", text, re.M | re.S)), re.M
    )
    conf, config = cluster.base / "slurm.conf", cluster.prefix / "etc" / "vtorque" / "vtorque.yaml"
    programs = cluster.base / "programs"
    programs.mkdir()
    for name, does in (("sinfo", "printf 'n1\\nn2\\n'"), ("scontrol", "echo 'no contact' >&2; exit 1")):
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    conf.write_text("ClusterName=site\n")
    site = {"SLURM_CONF": str(conf)}
    config.write_text(f"{CONFIG.replace('torque', 'slurm', 1)}slurm: {{bin: {programs}}}\n")
    own = cluster.nodes["n2"].base / "opt" / cluster.prefix.name
    written = cluster.prefix / "etc" / "vtorque" / "slurm.conf.vtorque"
    try:
        assert shown[0].split()[:2] == ["--engine", "slurm"] and shown[-1].split() == ["--check"]
        for words in shown[:-1]:
            told = cluster.install(*shlex.split(words), **site)
        found = lines(told)
        assert found == {
            "n1": "installed, Slurm's hooks, prefix shared",
            "n2": "installed, Slurm's hooks, prefix of its own",
        }
        assert "Prolog=" in told and " is missing" in told and conf.read_text() == "ClusterName=site\n"
        assert (own / "etc/vtorque/slurm.conf.vtorque").read_text() == written.read_text()
        for name in ("prolog", "epilog", "task_prolog"):
            hook, there = (place / "mom_priv_hooks" / "slurm" / name for place in (own, cluster.prefix))
            assert hook.read_text() == there.read_text() and hook.stat().st_mode & 0o777 == 0o755
        for name in ("n1", "n2"):
            node = cluster.nodes[name]
            assert not any(is_ours(path.read_bytes()) for path in node.mom_priv.iterdir() if path.is_file())
            assert (node.mom_priv / "config").read_text() == MOM_CONFIG
            assert (node.base / "spool" / "vtorque-install" / "manifest.json").exists()
            assert (node.base / "units" / "vtorque-reap.timer").exists()
        found = lines(cluster.install("--check", "--all", status=1, **site))
        assert set(found) == {"n1", "n2"}, "those of sinfo"
        assert found["n2"].endswith("Slurm's hooks, all as installed")
        conf.write_text(f"Include {written}\n")
        for words in shown[-1:]:
            assert cluster.install(*shlex.split(words), **site).splitlines()[-1] == "2 of 2 nodes done"
        (own / "mom_priv_hooks" / "slurm" / "prolog").write_text("#!/bin/sh\n")
        found = lines(cluster.install("--check", status=1, **site))
        assert found["n1"].endswith("all as installed") and "slurm/prolog was changed" in found["n2"], found
        (own / "mom_priv_hooks" / "slurm" / "prolog").unlink()

        assert "drains nodes" in cluster.install("--uninstall", status=2, **site)
        told = cluster.install("--uninstall", "--nodes", "n2", **site)
        assert "slurm.conf has hooks of vTorque (Prolog, Epilog, TaskProlog)" in told and set(lines(told)) == {"n2"}
        config.write_text(CONFIG)
        told = cluster.install("--nodes", "n1", status=2)
        assert "n1 has vTorque for another batch system than torque" in told and written.exists()
        cluster.install("--uninstall", "--nodes", "n1")
        cluster.install()
        assert not written.exists()
    finally:
        config.write_text(CONFIG)
        shutil.rmtree(programs)


# --- versions


@pytest.fixture(scope="module")
def newer(cluster: Cluster) -> Path:
    """A checkout of a newer version: another key in the configuration, another template."""
    folder = cluster.base / "newer"
    folder.mkdir()
    for part in PARTS:
        source = REPOSITORY / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    start = folder / "vmgr" / "__init__.py"
    start.write_text(re.sub('__version__ = ".*"', '__version__ = "99.1"', start.read_text()))
    schema = folder / "vmgr" / "schema.py"
    section = '    "news": {"told": Key(flag, False, "what only this version knows")},\n    "submit": {'
    schema.write_text(schema.read_text().replace('    "submit": {', section, 1))
    return folder


@pytest.fixture(scope="module")
def wheels(cluster: Cluster) -> Path:
    """All Python packages that an installation needs, in a folder."""
    folder = cluster.base / "wheels"
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--disable-pip-version-check", "--wheel-dir", str(folder)]
    subprocess.run([*pip, str(REPOSITORY), "setuptools", "wheel"], check=True, timeout=240)
    return folder


def test_an_upgrade_from_wheels(cluster: Cluster, newer: Path, wheels: Path) -> None:
    prefix, own = cluster.prefix, cluster.nodes["n2"].base / "opt" / cluster.prefix.name
    cluster.install("--nodes", "n[1-2]", "--prologalarm", "raise")
    template = prefix / "share" / "vtorque" / "templates" / "report.css"
    template.write_text("/* the site's */\n")
    old = (prefix / "current").readlink()
    strange = cluster.base / "strange"
    strange.mkdir()
    for name in ("sitecustomize", "json", "re", "vmgr", "setuptools"):
        (strange / f"{name}.py").write_text(f"open({str(strange / 'was run')!r}, 'w')\nraise SystemExit(1)\n")
    told = cluster.install(
        "--upgrade", "--wheels", str(wheels), source=newer, cwd=strange, PYTHONPATH=str(strange),
        PIP_USER="1", PIP_TARGET=str(strange),
        PIP_CONFIG_FILE="/dev/null", PIP_PROXY="x",
    )  # fmt: skip
    assert not (strange / "was run").exists(), "nothing of PYTHONPATH or of the folder that it is called in"
    assert "new in the configuration: news.told (default False): what only this version knows" in told
    assert f"kept: {prefix}/{old}/share/vtorque/templates/report.css was changed; it is used no more" in told
    assert {name: line.split(",")[0] for name, line in lines(told).items()} == {"n1": "is current", "n2": "installed"}
    for place in (prefix, own):
        done = subprocess.run([str(prefix / "bin" / "vmgr"), "--version"], check=True, capture_output=True, text=True)
        assert "99.1" in done.stdout and (place / old).is_dir(), "what runs keeps its programs"
        assert "99.1" in str((place / "current").readlink())
    assert (prefix / "etc" / "vtorque" / "vtorque.yaml").read_text() == CONFIG
    assert cluster.install("--check", source=newer).splitlines()[-1] == "2 of 2 nodes done"
    told = cluster.install("--check", status=1)
    assert "has version 99.1" in told and "has version 99.1" in lines(told)["n2"]

    told = cluster.install("--upgrade")
    assert str((prefix / "current").readlink()) == str(old) and template.read_text() == "/* the site's */\n"
    template.write_text((REPOSITORY / "templates" / "report.css").read_text())
    assert cluster.install("--check").splitlines()[-1] == "2 of 2 nodes done"


def test_an_installation_from_before_there_were_trees(cluster: Cluster) -> None:
    """Its folders become links, and its configuration stays; it has the embedded batch system."""
    prefix, base = cluster.prefix.with_name(f"{cluster.prefix.name}-old"), cluster.base / "old"
    source = build.source_at(str(REPOSITORY), __version__, "/usr/bin/python3")
    text = f"engine: local\nlocal: {{spool: {base}/local}}\npaths: {{spool: {base}/spool}}\n"
    try:
        shutil.copytree(cluster.prefix / "current", prefix, symlinks=True)
        (prefix / tree.SEAL).unlink()
        (prefix / "etc" / "vtorque").mkdir(parents=True)
        (prefix / "etc" / "vtorque" / "vtorque.yaml").write_text(text)
        (prefix / ".lock").touch()
        (base / "local" / "mom_priv").mkdir(parents=True)
        (base / "local" / "mom_priv" / "prologue").write_text("#!/bin/sh\n# vTorque: an old one\n")
        shutil.copytree(cluster.prefix / "trees" / source.name, prefix / "trees" / source.name, symlinks=True)
        command = [str(REPOSITORY / "install.sh"), "--prefix", str(prefix), "--no-links"]
        subprocess.run([*command, "--upgrade"], check=True, timeout=240)
        for name in LINKED:
            assert (prefix / name).readlink() == Path("current", name) and (prefix / "trees" / "before" / name).is_dir()
        subprocess.run([*command, "--check"], check=True, timeout=240)
        assert is_ours((base / "local" / "mom_priv" / "prologue.parallel").read_bytes())
        (base / "spool" / "jobs" / "7.here").mkdir(parents=True)
        done = subprocess.run([*command, "--uninstall"], capture_output=True, text=True, timeout=240)
        assert done.returncode == 2 and "guest jobs are there (7.here)" in done.stderr
        (base / "spool" / "jobs" / "7.here").rmdir()
        subprocess.run([*command, "--uninstall"], check=True, timeout=240)
        left = [str(path.relative_to(prefix)) for path in prefix.rglob("*") if not path.is_dir()]
        assert left == ["etc/vtorque/vtorque.yaml"], "the site's own configuration stays"
        assert list((base / "local" / "mom_priv").iterdir()) == []
    finally:
        shutil.rmtree(prefix, ignore_errors=True)


# --- away


def test_a_node_that_is_down_holds_up_the_removal(cluster: Cluster) -> None:
    n2 = cluster.nodes["n2"]
    cluster.install("--nodes", "n[1-2]")
    n2.stop()
    told = cluster.install("--uninstall", status=1)
    assert lines(told)["n1"].startswith("vTorque removed, given back: epilogue, epilogue.parallel"), told
    assert "1 of 2 nodes done, not done: n2; the same command does them later" in told
    assert f"{cluster.prefix} stays until that is done" in told and (cluster.prefix / "bin" / "vsub").exists()
    assert "n2: forgotten" in cluster.install("--check", "--forget", "n2")
    assert lines(cluster.install("--check")) == {}
    n2.start()


def test_documented_commands(cluster: Cluster) -> None:
    """Every command that the documentation shows, in its order; the last one takes all away."""
    text = (REPOSITORY / "docs" / "admins.md").read_text()
    shown = re.findall(
        r"^# \./install\.sh(.*)$", "".join(re.findall(r"^```console\n(.*?)^```$", text, re.M | re.S)), re.M
    )
    (cluster.base / "site.yaml").write_text(re.findall(r"^```yaml\n(nodes: .*?)^```$", text, re.M | re.S)[0])
    cluster.nodes["n3"].start()
    for words in shown:
        told = cluster.install(*shlex.split(words), cwd=cluster.base)
    assert shown[-1].split() == ["--uninstall"] and len(shown) > 6
    assert set(lines(told)) == {"n1", "n2"} and told.splitlines()[-1] == f"vTorque is removed from {cluster.prefix}"
    assert not cluster.prefix.exists() and cluster.picture() == BEFORE, "file by file as it was"
    assert "nothing of vTorque" in cluster.install("--uninstall")
