"""What the mother superior makes of the other nodes' words."""

from __future__ import annotations

import pytest

from vmgr.errors import Code, VTorqueError
from vmgr.node.fellows import check_image
from vmgr.node.meeting import kept


def test_guests_of_one_job_have_one_image() -> None:
    long = f"{'n' * 64}@123456789"
    for image in ("micro@3", long, f"/home/carol/{'d' * 200}.qcow2"):
        check_image(image, "n2", kept({"image": image}).get("image"))
    for said in (None, 7, ["micro@4"]):
        check_image("micro@3", "n2", kept({"image": said}).get("image"))
    for said in ("micro@4", "", "x" * 9000):
        with pytest.raises(VTorqueError, match=r"the guests on n2 have the image .*, those of .* micro@3") as refused:
            check_image("micro@3", "n2", kept({"image": said}).get("image"))
        assert refused.value.code is Code.IMAGE
