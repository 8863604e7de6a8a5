"""What is asked for, held against the site's policy: by vsub, and by root again in a specification."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from test_jobspec import SPEC
from vsubsite import Site

from vmgr.checks import Checker, check_shares, check_spec, choose_image, guest_features, guest_group, visible_in_guest
from vmgr.config import Config, Mount, load_config
from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import Disk, GuestGroup, Iocm, Pinning
from vmgr.policy import Subject
from vmgr.request import Request, parse_vm

CAROL = Subject("carol", "users", None)
GROUP = GuestGroup("micro", 1, 1, 512)


@pytest.fixture
def config(site: Site) -> Config:
    return load_config(site.install)


def request(text: str) -> Request:
    found = parse_vm(text, "here")
    assert found is not None
    return found


def checker(config: Config, request: Request | None = None) -> Checker:
    return Checker(config, config.policy_for(CAROL), {key: asked.source for key, asked in (request or {}).items()})


def test_defaults(config: Config) -> None:
    assert guest_group({}, checker(config)) == GROUP
    asked = request("img=debian-12,vcpus=8,ram=4G")
    assert guest_group(asked, checker(config, asked)) == GuestGroup("debian-12", 1, 8, 4096)


def test_revisions_of_what_is_allowed(site: Site) -> None:
    for allowed, fine, refused in (
        ("[micro]", ("micro", "micro@1"), ("debian-12", "debian-12@1")),
        ("[micro@1]", ("micro@1",), ("micro", "micro@2")),
    ):
        site.configure(f"policy: {{img: {{allowed: {allowed}}}}}\n")
        config = load_config(site.install)
        for name in fine:
            checker(config).group(GROUP._replace(image=name))
        for name in refused:
            with pytest.raises(VTorqueError, match=f"img={name} is not allowed; allowed: micro"):
                checker(config).group(GROUP._replace(image=name))
    site.configure("policy: {img: {default: micro@1, allowed: [micro]}}\n")
    assert guest_group({}, checker(load_config(site.install))).image == "micro@1"


def test_default_features(config: Config) -> None:
    features = guest_features({}, checker(config), 1)
    assert features._asdict() == {
        "pinning": "auto",
        "fs_type": "overlay",
        "disk": None,
        "mounts": ("home", "opt-hpc"),
        "network": "user",
        "iocm": None,
        "vrdma": False,
        "unclot_mib": None,
        "suspend": False,
    }


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"vcpus": 9}, "vcpus=9 (here) is above the maximum 8; 1 to 8 is allowed"),
        ({"vcpus": 0}, "vcpus=0 (here) is below the minimum 1"),
        ({"ram_mib": 127}, "ram=127M (here) is below the minimum 128M"),
        ({"ram_mib": 4097}, "ram=4097M (here) is above the maximum 4G"),
        ({"per_node": 17}, "vms_per_node=17 (here) is above the maximum 16"),
        ({"image": "suse"}, "img=suse (here): unknown image"),
    ],
)
def test_root_refuses_the_same_in_a_specification(config: Config, fields: dict[str, Any], text: str) -> None:
    group = GuestGroup("micro", 1, 2, 512)._replace(**fields)
    with pytest.raises(VTorqueError) as caught:
        check_spec(SPEC._replace(groups=(group,)), config, CAROL, "here", nodes=1)
    assert text in str(caught.value)


def test_root_refuses_more_nodes_than_the_policy_has(site: Site) -> None:
    site.configure("policy: {vcpus: {max: 8}, ram: {max: 4G}, nodes: {max: 2}}\n")
    config = load_config(site.install)
    spec = SPEC._replace(mounts=("home", "opt-hpc"))
    assert check_spec(spec, config, CAROL, "here", nodes=2).name == "micro"
    with pytest.raises(VTorqueError, match=r"the job has 3 nodes; 1 to 2 are allowed \(.*vtorque.yaml line") as caught:
        check_spec(spec, config, CAROL, "here", nodes=3)
    assert caught.value.code is Code.POLICY


def test_the_network_that_nobody_asks_for_is_no_refusal_of_roots(site: Site) -> None:
    site.configure("policy: {vcpus: {max: 8}, ram: {max: 4G}, network: {enabled: false}}\n")
    config, spec = load_config(site.install), SPEC._replace(mounts=("home", "opt-hpc"))
    check_spec(spec, config, CAROL, "here", nodes=1)
    check_spec(spec._replace(network="job"), config, CAROL, "here", nodes=2)
    check_spec(spec._replace(network="job"), config, CAROL, "here", nodes=1)  # its nodes may be one by now
    site.configure("policy: {network: {enabled: false, allowed: [user, bridge, job]}}\n")
    with pytest.raises(VTorqueError, match="network is switched off here"):
        check_spec(spec._replace(network="bridge"), load_config(site.install), CAROL, "here", nodes=1)


def test_specification(config: Config) -> None:
    spec = SPEC._replace(mounts=("home", "opt-hpc"))
    assert check_spec(spec, config, CAROL, "here", nodes=1).name == "micro"
    assert check_spec(spec._replace(mounts=("home",)), config, CAROL, "here", nodes=1).name == "micro"


@pytest.mark.parametrize("kind", ["virtiofs", "nfs"])
def test_a_share_that_the_image_cannot_mount(site: Site, kind: str) -> None:
    source = "nfs1:/opt, security: krb5" if kind == "nfs" else "/opt"
    site.configure(
        f"mounts:\n- {{name: home, source: '{{home}}', target: '{{home}}'}}\n"
        f"- {{name: opt, kind: {kind}, source: {source}, target: /opt}}\n"
    )
    config = load_config(site.install)
    assert check_spec(SPEC._replace(mounts=("home",), asked=("mounts",)), config, CAROL, "here", nodes=1)
    with pytest.raises(VTorqueError) as caught:
        check_spec(SPEC._replace(mounts=("home", "opt")), config, CAROL, "here", nodes=1)
    assert caught.value.code is Code.IMAGE
    assert f"the image micro cannot mount the share opt, which is of kind {kind}" in str(caught.value)
    assert "leave opt out of mounts=" in str(caught.value)


def test_shares_of_guests_that_can_be_suspended_are_mounted_by_9p(site: Site) -> None:
    site.configure(
        "mounts:\n- {name: home, source: '{home}', target: '{home}'}\n"
        "- {name: opt, kind: virtiofs, source: /opt, target: /opt}\n"
        "suspended: {folder: /scratch/s}\n"
    )
    config, spec = load_config(site.install), SPEC._replace(mounts=("home", "opt"))
    assert check_spec(spec._replace(suspend=True), config, CAROL, "here", nodes=1), "micro has 9p alone"
    image = choose_image(GROUP, None, None, checker(config))._replace(features=("virtiofs",))
    check_shares(("opt",), image, checker(config), suspend=False)
    with pytest.raises(VTorqueError, match=r"which is of kind 9p .*; by virtiofs it is there with suspend=off"):
        check_shares(("opt",), image, checker(config), suspend=True)


def test_guests_that_go_on_have_the_revision_that_they_had(site: Site) -> None:
    site.configure("policy: {img: {default: micro, allowed: [micro]}}\n")
    config, spec = load_config(site.install), SPEC._replace(mounts=("home", "opt-hpc"))
    newest = check_spec(spec, config, CAROL, "here", nodes=1)
    folder = Path(newest.folder)
    shutil.copytree(folder, folder.with_name("7"))
    assert check_spec(spec, config, CAROL, "here", nodes=1).revision == 7
    assert check_spec(spec, config, CAROL, "here", nodes=1, stored=newest.reference) == newest
    with pytest.raises(VTorqueError, match=r"img=micro@9 .*has no revision 9") as caught:
        check_spec(spec, config, CAROL, "here", nodes=1, stored="micro@9")
    assert caught.value.code is Code.IMAGE


OPEN = """\
components: {iocm: true, vrdma: true, unclot: true}
policy:
  img: {default: micro}
  vcpus: {max: 8}
  vms_per_node: {max: 4}
  fs_type: {allowed: [overlay, ramdisk]}
  network: {allowed: [user, job]}
  disk: {enabled: true, max: 10G}
  metadata: {allowed: [packages]}
  iocm_max_cores: {max: 4}
  unclot_shmem: {max: 128M}
"""


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"groups": (GROUP, GROUP)}, Code.POLICY, "here asks for 2 guest groups; 1 is allowed"),
        ({"mounts": ("home", "secret")}, Code.POLICY, "mounts=home+secret names secret, which the site has not"),
        ({"distro": "redhat"}, Code.IMAGE, "distro=redhat (here) does not describe the image micro"),
        ({"arch": "arm64"}, Code.IMAGE, "arch=arm64 (here) does not describe the image micro; it is x86_64"),
        ({"fs_type": "sharedfs"}, Code.POLICY, "fs_type=sharedfs is not allowed; allowed: overlay, ramdisk"),
        ({"network": "bridge"}, Code.POLICY, "network=bridge is not allowed; allowed: user, job"),
        ({"disk": Disk(None, 10241)}, Code.POLICY, "disk=10241M is too large; at most 10G"),
        ({"iocm": Iocm(0, 5)}, Code.POLICY, "iocm_max_cores=5 is above the maximum 4; 0 to 4 is allowed"),
        ({"iocm": Iocm(4, 3)}, Code.POLICY, "iocm_min_cores=4 is above iocm_max_cores=3"),
        ({"unclot_mib": 129}, Code.POLICY, "unclot_shmem=129M is above the maximum 128M"),
        ({"pinning": Pinning("map", (("0",),))}, Code.POLICY, "here does not bind each vCPU of each guest"),
        ({"pinning": Pinning("map", (("0", "1"), ("2", "3")))}, Code.POLICY, "does not bind each vCPU"),
        ({"metadata": {"runcmd": ["true"]}}, Code.POLICY, "metadata=runcmd is not allowed; allowed: packages"),
        ({"metadata": {"packages": ["gcc"]}}, Code.IMAGE, "metadata needs cloud-init, which the image micro has not"),
        ({"groups": (GuestGroup("debian-12", 1, 1, 256),)}, Code.POLICY, "ram=256M (here) is less than the image"),
    ],
)
def test_what_a_hand_written_specification_cannot_get(
    site: Site, fields: dict[str, Any], code: Code, text: str
) -> None:
    site.configure(OPEN)
    config = load_config(site.install)
    check_spec(
        SPEC._replace(
            groups=(GuestGroup("micro", 4, 8, 512),), fs_type="ramdisk", network="job", disk=Disk(None, 10240),
            iocm=Iocm(1, 4), vrdma=True, unclot_mib=128, pinning=Pinning("map", (("0-7",) * 8,) * 4),
        ), config, CAROL, "here", nodes=2,
    )  # fmt: skip
    with pytest.raises(VTorqueError) as caught:
        check_spec(SPEC._replace(**fields), config, CAROL, "here", nodes=1)
    assert caught.value.code is code and text in str(caught.value)


@pytest.mark.parametrize("component", ["iocm", "vrdma", "unclot"])
def test_components_that_the_site_has_not(config: Config, component: str) -> None:
    fields: dict[str, Any] = {"iocm": Iocm(1, 1), "vrdma": True, "unclot_mib": 64}
    field = "unclot_mib" if component == "unclot" else component
    with pytest.raises(VTorqueError, match=f"{component}=true is not available on this site; components.{component}"):
        check_spec(SPEC._replace(**{field: fields[field]}), config, CAROL, "here", nodes=1)


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        ("vm_prologue", {"vm_prologue": "0" * 64}),
        ("vm_epilogue", {"vm_epilogue": "0" * 64}),
        ("metadata", {"metadata": {"packages": []}}),
        ("disk", {"disk": Disk(None, 1)}),
        ("vcpu_pinning", {"pinning": Pinning("off", None)}),
        ("vcpu_pinning", {"pinning": Pinning("numad", None)}),
        ("mounts", {"mounts": ("home",)}),
        ("iocm", {"iocm": Iocm(1, 1)}),
        ("vrdma", {"vrdma": True}),
        ("unclot", {"unclot_mib": 64}),
    ],
)
def test_features_that_are_switched_off(site: Site, key: str, fields: dict[str, Any]) -> None:
    site.configure(f"components: {{iocm: true, vrdma: true, unclot: true}}\npolicy: {{{key}: {{enabled: false}}}}\n")
    with pytest.raises(VTorqueError) as caught:
        check_spec(
            SPEC._replace(**{"mounts": ("home", "opt-hpc"), **fields}),
            load_config(site.install),
            CAROL,
            "here",
            nodes=1,
        )
    assert caught.value.code is Code.POLICY
    assert f" is refused; {key} is switched off here (policy.{key}.enabled, {site.install.config} line 4)" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"interactive": True}, "an interactive job"),
        ({"network": "bridge"}, "network=bridge"),
        ({"iocm": Iocm(1, 1)}, "iocm=true"),
        ({"vrdma": True}, "vrdma=true"),
        ({"unclot_mib": 64}, "unclot=true"),
        ({"groups": (GROUP._replace(image="/home/carol/d.qcow2"),)}, "img=/home/carol/d.qcow2"),
    ],
)
def test_what_does_not_go_with_suspension(site: Site, fields: dict[str, Any], what: str) -> None:
    site.configure(
        "components: {iocm: true, vrdma: true, unclot: true}\n"
        "policy: {img: {default: micro}, vcpus: {max: 8}, network: {allowed: [user, bridge]}}\n"
        "suspended: {folder: /scratch/s}\n"
    )
    text = site.install.config.read_text()
    site.install.config.write_text(text.replace("images: {pool:", "images: {allow_user_images: true, pool:"))
    config = load_config(site.install)
    spec = SPEC._replace(mounts=("home", "opt-hpc"), suspend=True)
    assert check_spec(spec, config, CAROL, "here", nodes=1).name == "micro"
    with pytest.raises(VTorqueError, match="suspend=true does not go with") as caught:
        check_spec(spec._replace(**fields), config, CAROL, "here", nodes=1)
    assert what in str(caught.value) and caught.value.code is Code.POLICY


def test_suspension_needs_a_folder_and_permission(site: Site) -> None:
    spec = SPEC._replace(mounts=("home", "opt-hpc"), suspend=True)
    for config, text in (
        ("policy: {}\n", "suspended.folder is not set"),
        ("policy: {suspend: {enabled: false}}\nsuspended: {folder: /s}\n", "suspend is switched off here"),
    ):
        site.configure(config)
        with pytest.raises(VTorqueError, match=text):
            check_spec(spec, load_config(site.install), CAROL, "here", nodes=1)
    site.configure("policy: {suspend: {enabled: false, default: true}}\nsuspended: {folder: /s}\n")
    assert check_spec(spec, load_config(site.install), CAROL, "here", nodes=1)


def test_a_default_needs_no_permission(site: Site) -> None:
    site.configure(
        "components: {vrdma: true}\n"
        "policy: {vrdma: {enabled: false, default: true}, vcpu_pinning: {enabled: false, default: off},\n"
        "  mounts: {enabled: false, default: [home]}}\n"
    )
    config = load_config(site.install)
    features = guest_features({}, checker(config), 1)
    assert (features.vrdma, features.pinning, features.mounts) == (True, "off", ("home",))
    spec = SPEC._replace(vrdma=True, pinning=Pinning("off", None), mounts=("home",))
    assert check_spec(spec, config, CAROL, "here", nodes=1).name == "micro"


def test_overrides_hold_on_the_node_too(site: Site) -> None:
    site.configure("policy: {vcpus: {max: 1}, users: {carol: {vcpus: {max: 2}}}}\n")
    config = load_config(site.install)
    spec = SPEC._replace(mounts=("home", "opt-hpc"))
    assert check_spec(spec, config, CAROL, "here", nodes=1).name == "micro"
    with pytest.raises(VTorqueError, match=r"vcpus=2 \(here\) is above the maximum 1; 1 to 1 is allowed \(.* line 3\)"):
        check_spec(spec, config, Subject("dave", "users", None), "here", nodes=1)


def test_allowed_images(site: Site) -> None:
    site.configure("policy: {img: {default: micro, allowed: [micro]}}\n")
    with pytest.raises(VTorqueError, match=r"img=debian-12 is not allowed; allowed: micro \(.* line 3\)"):
        checker(load_config(site.install)).group(GuestGroup("debian-12", 1, 1, 512))


@pytest.mark.parametrize("distro", [None, "SLG", "slg", "micro", "MICRO"])
def test_distro_asserts(config: Config, distro: str | None) -> None:
    assert choose_image(GROUP, distro, None, checker(config)).name == "micro"


@pytest.mark.parametrize("arch", [None, "x86_64", "amd64", "AMD64"])
def test_arch_asserts(config: Config, arch: str | None) -> None:
    assert choose_image(GROUP, None, arch, checker(config)).name == "micro"


@pytest.mark.parametrize(
    ("mounts", "default"),
    [
        ("", ("home", "opt-hpc", "data")),
        ("mounts: {allowed: [data, home]}, ", ("home", "data")),
        ("mounts: {default: [data]}, ", ("data",)),
        ("mounts: {default: []}, ", ()),
        ("mounts: {allowed: []}, ", ()),
    ],
)
def test_default_shares(site: Site, mounts: str, default: tuple[str, ...]) -> None:
    site.configure(
        "mounts:\n- {name: home, source: '{home}', target: '{home}'}\n"
        "- {name: opt-hpc, source: /opt, target: /opt-hpc}\n"
        f"- {{name: data, source: /data, target: /data}}\npolicy: {{{mounts}img: {{default: micro}}}}\n"
    )
    assert guest_features({}, checker(load_config(site.install)), 1).mounts == default


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("/home/carol", True),
        ("/home/carol/x", True),
        ("/home/carolyn", False),
        ("/home", False),
        ("/", False),
        ("/opt", False),
        ("/opt-hpc", False),
        ("/data/a", True),
    ],
)
def test_visible_in_guest(path: str, seen: bool) -> None:
    mounts = (
        Mount("home", "9p", "{home}", "{home}", False).filled({"home": "/home/carol"}),
        Mount("opt", "9p", "/opt", "/opt-hpc", True),
        Mount("data", "9p", "/data/", "/data/", False),
    )
    assert visible_in_guest(path, mounts) is seen
