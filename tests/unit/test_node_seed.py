"""The seed: whatever the values are, the files say exactly these values, and the image holds exactly these files."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pycdlib
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, TEMPLATES, a_user

from vmgr.config import Mount
from vmgr.errors import Code, VTorqueError
from vmgr.node.network.plan import GuestNet
from vmgr.node.seed import MAX_HOOK_BYTES, SeedPlan, seed_files, site_hooks, write_seed

MOUNTS = (Mount("home", "9p", "/home/carol", "/home/carol", False), Mount("opt-hpc", "9p", "/opt", "/opt-hpc", True))
PLAN = SeedPlan(
    instance="12.host-1", hostname="vn1-1", family="micro", user=a_user(),
    ssh_public_key="ssh-ed25519 AAAA",
    host_key="-----BEGIN-----\nabc\n-----END-----\n", host_key_pub="ssh-ed25519 BBBB vtorque", mounts=MOUNTS,
    network=GuestNet(mac="52:54:00:00:00:01"),
    hosts=(("10.1.0.1", "vn1-1"), ("10.1.0.2", "vn2-1")), slots=(("vn1-1", 2), ("vn2-1", 1)),
    environment={"DISTRO": "SLG", "VTORQUE_JOBID": "12.host"},
    metadata=None,
)  # fmt: skip
HOSTILE = [
    "it's", 'a "b" c', "a\nb", "{{ 7*7 }}", "{% raw %}", "%}", "#cloud-config", "a: b", "- x",
    "'", "\\", "$(id)", "`id`",
    "a\tb", "ünï", "日本", "😀", "\u2028", "\x7f", "\x85", "\udcff", "yes", "0x10", "1e3", "null", "~",
    " lead", "trail ", "",
    "!!python/object:os.system", "&a", "*a", "a\\ud83d\\ude00", "\ufeff", "Carol C,,,",
]  # fmt: skip

TEMPLATE = """\
#cloud-config
# every value that a template may name
all: [{{ instance_id }}, {{ hostname }}, {{ user.name }}, {{ user.uid }}, {{ user.home }}, {{ user.shell }}]
keys:
  {{ ssh_public_key }}: {{ host_key }}
{% for group in user.groups %}
{{ group.name }}: {gid: {{ group.gid }}}
{% endfor %}
mounts:
{% for mount in mounts %}
  - [{{ mount.tag }}, {{ mount.target }}, {{ mount.readonly }}]
{% endfor %}
"""


def rendered(plan: SeedPlan, folder: Path, name: str = "user-data", template: str = TEMPLATE) -> bytes:
    """What a template of our own comes to."""
    for path, text in (("common/guest", "g"), ("common/run", "r"), ("common/rsh", "s")):
        (folder / "guest" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "guest" / path).write_text(text)
    family = folder / "guest" / plan.family
    family.mkdir(parents=True, exist_ok=True)
    for file in ("user-data", "meta-data", "network-config"):
        (family / f"{file}.j2").write_text(template if file == name else "{}\n")
    return seed_files(plan, folder, {})[name]


def parsed(data: bytes) -> Any:
    return yaml.safe_load(data)


def utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def octal(text: str) -> str:
    """As /proc/mounts has it."""
    for char in "\\ \t\n":
        text = text.replace(char, f"\\{ord(char):03o}")
    return text


def values_of(text: str) -> SeedPlan:
    """A plan with `text` wherever a value goes; the node's name and keys are always good UTF-8."""
    good = utf8(text)
    user = a_user(name=text, home=text, shell=text, group=text, groups=((f"{text}.", 1),))
    return PLAN._replace(
        instance=text, hostname=good, user=user, ssh_public_key=f"{text} key", host_key=good,
        mounts=(Mount(text, "9p", text, text, True),), environment={"A": text},
        network=GuestNet(text, text, text, 1400, (text,), text, ("b",), (text, "n2")), wait_hosts=True,
    )  # fmt: skip


def check_yaml(text: str, folder: Path) -> None:
    tree = parsed(rendered(values_of(text), folder))
    assert tree["all"] == [text, utf8(text), text, 4711, text, text]
    assert tree["keys"] == {f"{text} key": utf8(text)}
    assert tree[f"{text}."] == {"gid": 1} and tree["mounts"] == [[text, text, True]]


@pytest.mark.parametrize("text", HOSTILE)
def test_yaml_says_exactly_the_value(text: str, tmp_path: Path) -> None:
    check_yaml(text, tmp_path)


# at most 90 characters, of at most 10 each once escaped: the text stands as a key too, and YAML 1.1 (7.4.2 of 1.2)
# takes no key of more than 1024 characters that is not marked by `?`
@FUZZ
@given(text=st.text(max_size=90))
def test_yaml_says_exactly_any_value(tmp_path: Path, text: str) -> None:
    if f"{text}." not in ("all.", "keys.", "mounts."):
        check_yaml(text, tmp_path)


SH = "#!/bin/sh\nprintf '%s\\0' {{ hostname }} {{ user.name }} {{ user.uid }} {{ host_key }}\n"


@pytest.mark.parametrize("text", [text for text in HOSTILE if "\0" not in text])
def test_a_shell_template_says_exactly_the_value(text: str, tmp_path: Path) -> None:
    script = tmp_path / "user-data"
    script.write_bytes(rendered(values_of(text), tmp_path / "t", template=SH))
    subprocess.run(["sh", "-n", str(script)], check=True)
    said = subprocess.run(["sh", str(script)], check=True, capture_output=True).stdout
    assert said == b"".join(os.fsencode(word) + b"\0" for word in (utf8(text), text, "4711", utf8(text)))


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("shell", [["sh"], ["bash", "--posix"]])
def test_guest_env_gives_exactly_the_values(text: str, shell: list[str], tmp_path: Path) -> None:
    env = tmp_path / "guest.env"
    plan = values_of(text)
    env.write_bytes(seed_files(plan._replace(family="micro"), TEMPLATES, {})["vtorque/guest.env"])
    expected = {
        "VT_USER": text, "VT_UID": "4711", "VT_GID": "4712", "VT_GROUP": text, "VT_HOME": text, "VT_SHELL": text,
        "VT_GROUPS": f"{text}.:1", "VT_HOSTNAME": utf8(text), "VT_PUBKEY": f"{text} key",
        "VT_MOUNTS": f"{octal(text)} 9p {octal(text)} ro - -",
        "VT_MAC": text, "VT_ADDRESS": text, "VT_GATEWAY": text, "VT_MTU": "1400", "VT_DNS": text,
        "VT_SEARCH": f"{text} b" if text else "b", "VT_NTP": f"{text} n2", "VT_WAIT_HOSTS": "1",
        "VT_ENV": f"A={text}",
    }  # fmt: skip
    subprocess.run([*shell, "-n", str(env)], check=True)
    words = " ".join(f'"${name}"' for name in expected)
    said = subprocess.run(
        [*shell, "-c", f". {shlex.quote(str(env))}; printf '%s\\0' {words}"], check=True, capture_output=True
    ).stdout
    assert said.split(b"\0")[:-1] == [os.fsencode(value) for value in expected.values()]


def test_a_template_that_names_what_there_is_not_fails(tmp_path: Path) -> None:
    with pytest.raises((jinja2.UndefinedError, TypeError)):
        rendered(PLAN, tmp_path, template="a: {{ nothing }}\n")


@pytest.mark.parametrize("family", sorted(p.parent.name for p in TEMPLATES.glob("guest/*/user-data.j2")))
def test_the_real_templates(family: str) -> None:
    files = seed_files(PLAN._replace(family=family), TEMPLATES, {"prologue": b"#!/bin/sh\n"})
    assert {"instance-id": "12.host-1", "local-hostname": "vn1-1"}.items() <= parsed(files["meta-data"]).items()
    assert parsed(files["network-config"])["version"] == 2
    if files["user-data"].startswith(b"#cloud-config"):
        assert isinstance(parsed(files["user-data"]), dict)
    else:
        subprocess.run(["sh", "-n"], input=files["user-data"], check=True)
    assert files["vtorque/prologue"] == b"#!/bin/sh\n" and "vtorque/epilogue" not in files
    assert files["vtorque/ssh_host_ed25519_key"] == PLAN.host_key.encode()


def test_the_files_that_name_the_jobs_guests() -> None:
    files = seed_files(PLAN._replace(user_key="PRIVATE\n"), TEMPLATES, {})
    named = {name: files[f"vtorque/{name}"].decode() for name in ("hosts", "nodefile", "hostfile", "machinefile")}
    assert named == {
        "hosts": "127.0.0.1 localhost\n::1 localhost\n10.1.0.1 vn1-1\n10.1.0.2 vn2-1\n",
        "nodefile": "vn1-1\nvn1-1\nvn2-1\n",
        "hostfile": "vn1-1 slots=2\nvn2-1 slots=1\n",
        "machinefile": "vn1-1:2\nvn2-1:1\n",
    }


def test_guests_that_do_not_reach_each_other() -> None:
    files = seed_files(PLAN, TEMPLATES, {})
    assert not {f"vtorque/{name}" for name in ("key", "ssh_config", "known_hosts", "hostfile", "machinefile")} & set(
        files
    )
    assert "vtorque/ssh_host_ed25519_key-cert.pub" not in files
    assert "vtorque/hostfile" in seed_files(PLAN._replace(slots=(("vn1-1", 2),)), TEMPLATES, {})


def test_the_keys_of_a_job() -> None:
    files = seed_files(PLAN._replace(user_key="PRIVATE\n", host_cert="CERT\n"), TEMPLATES, {})
    assert files["vtorque/key"] == b"PRIVATE\n" and files["vtorque/ssh_host_ed25519_key-cert.pub"] == b"CERT\n"
    assert files["vtorque/known_hosts"] == b"@cert-authority vn1-1,vn2-1 ssh-ed25519 AAAA\n"
    assert not [name for name, data in files.items() if b"PRIVATE" in data and name != "vtorque/key"]


@pytest.mark.parametrize("count", [2, 4000])
def test_ssh_takes_its_configuration_for_the_jobs_guests_alone(count: int, tmp_path: Path) -> None:
    slots = tuple((f"vnode{number}-1", 1) for number in range(count))
    files = seed_files(PLAN._replace(user_key="k", slots=slots), TEMPLATES, {})
    (tmp_path / "config").write_bytes(files["vtorque/ssh_config"])

    def shown(name: str) -> set[str]:
        command = ["ssh", "-F", str(tmp_path / "config"), "-G", name]
        return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines())

    ours = {
        "identityfile /run/vtorque/key", "identitiesonly yes", "userknownhostsfile /run/vtorque/known_hosts",
        "stricthostkeychecking true", "batchmode yes", "loglevel ERROR",
    }  # fmt: skip
    assert ours <= shown(slots[-1][0]) and not ours & shown(f"vnode{count}-1")


STATIC = GuestNet(
    "52:54:00:00:00:02", "10.1.0.2/16", "10.1.0.1", 1450, ("10.1.0.3", "10.1.0.4"), "job.test", ("a.org", "job.test")
)


@pytest.mark.parametrize("family", ["debian", "micro", "redhat"])
@pytest.mark.parametrize(
    ("network", "settings"),
    [
        (GuestNet("52:54:00:00:00:02"), {"dhcp4": True}),
        (
            GuestNet("52:54:00:00:00:02", dns=("10.1.0.3",), mtu=9000),
            {"dhcp4": True, "mtu": 9000, "nameservers": {"addresses": ["10.1.0.3"], "search": []}},
        ),
        (
            STATIC,
            {
                "dhcp4": False,
                "mtu": 1450,
                "addresses": ["10.1.0.2/16"],
                "routes": [{"to": "0.0.0.0/0", "via": "10.1.0.1"}],
                "nameservers": {"addresses": ["10.1.0.3", "10.1.0.4"], "search": ["job.test", "a.org"]},
            },
        ),
        (GuestNet("52:54:00:00:00:02", "10.1.0.2/16"), {"dhcp4": False, "addresses": ["10.1.0.2/16"]}),
    ],
)  # fmt: skip
def test_the_network_of_cloud_init(family: str, network: GuestNet, settings: dict[str, Any]) -> None:
    files = seed_files(PLAN._replace(family=family, network=network), TEMPLATES, {})
    assert parsed(files["network-config"]) == {
        "version": 2,
        "ethernets": {"e*": {"match": {"name": "e*", "macaddress": "52:54:00:00:00:02"}, **settings}},
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_the_network_of_cloud_init_says_exactly_the_value(text: str) -> None:
    plan = values_of(text)
    files = seed_files(plan._replace(family="debian"), TEMPLATES, {})
    found = parsed(files["network-config"])["ethernets"]["e*"]
    assert found["match"] == {"name": "e*", "macaddress": text}
    assert found["nameservers"]["addresses"] == [text] and found.get("addresses", [""]) == [text]


def test_the_image_holds_exactly_the_files(tmp_path: Path) -> None:
    files = seed_files(PLAN, TEMPLATES, {"prologue": os.urandom(70_000), "epilogue": b""})
    target = tmp_path / "seed.iso"
    old = os.umask(0)
    try:
        write_seed(files, target)
    finally:
        os.umask(old)
    assert target.stat().st_mode & 0o777 == 0o600
    iso = pycdlib.PyCdlib()
    iso.open(str(target))
    try:
        assert iso.pvd.volume_identifier.strip() == b"cidata" and iso.has_rock_ridge() and iso.has_joliet()
        for kind in ("rr_path", "joliet_path"):
            found = {}
            for folder, _, names in iso.walk(**{kind: "/"}):
                for name in names:
                    path = f"{folder.rstrip('/')}/{name}"
                    data = io.BytesIO()
                    iso.get_file_from_iso_fp(data, **{kind: path})
                    found[path[1:]] = data.getvalue()
                    if kind == "rr_path":  # no user of the guest reads the keys while the image is mounted
                        assert iso.get_record(rr_path=path).rock_ridge.get_file_mode() == 0o100400
            assert found == files
    finally:
        iso.close()


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "directory", "fifo"])
def test_nothing_in_the_way_is_followed_or_overwritten(kind: str, tmp_path: Path) -> None:
    target, other = tmp_path / "seed.iso", tmp_path / "other"
    if kind == "file":
        target.write_text("mine")
    elif kind == "directory":
        target.mkdir()
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        if kind == "link":
            other.write_text("mine")
        target.symlink_to(other)
    with pytest.raises(OSError):
        write_seed({"meta-data": b"x", "vtorque/run": b""}, target)
    assert (other.read_text() == "mine") if kind == "link" else not other.exists()
    assert kind != "file" or target.read_text() == "mine"


def test_the_sites_hooks(tmp_path: Path) -> None:
    assert site_hooks(tmp_path, 0) == {}
    with pytest.raises(VTorqueError, match=r"VT-STAGE: .*absent \(guest\.vm_hooks\) is not there"):
        site_hooks(tmp_path / "absent", 1)
    (tmp_path / "prologue").write_bytes(b"#!/bin/sh\n\xff")
    (tmp_path / "other").write_text("x")
    assert site_hooks(tmp_path, 0) == {"prologue": b"#!/bin/sh\n\xff"}
    assert site_hooks(tmp_path, 1) == {}
    (tmp_path / "epilogue.parallel").write_bytes(b"#!/bin/sh\nexit 3\n")
    assert site_hooks(tmp_path, 7) == {"epilogue": b"#!/bin/sh\nexit 3\n"}
    assert "epilogue" not in site_hooks(tmp_path, 0)


def test_half_a_hook_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "epilogue").write_bytes(b"#" * (MAX_HOOK_BYTES + 1))
    with pytest.raises(VTorqueError, match="larger than") as caught:
        site_hooks(tmp_path, 0)
    assert caught.value.code is Code.STAGE
