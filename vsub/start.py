"""Where the program `vsub` begins: Ctrl-C while modules are loaded ends it as it would end any program."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the interpreter's own part of `signal`, which takes time to load

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from vsub.cli import main as run


def main(argv: list[str]) -> int:
    """Run `vsub` with `argv`; gives its exit status."""
    if _signal.getsignal(_signal.SIGINT) == _signal.SIG_DFL:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    return run(argv)
