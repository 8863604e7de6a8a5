"""A command line in the language of TORQUE's `qsub`, taken apart exactly, with `vsub`'s own words taken out.

The grammar is TORQUE 6.1's (`GETOPT_ARGS` in src/cmds/qsub_functions.c) as getopt(3) reads it: flags may be
bundled, a value is attached or the next argument, options may follow the script. Ours are whole words where
an option may stand: `-vm VALUE`, `--wait`, `--debug`, `--version`, `--help`; so `-v m` and `-vmx` stay
qsub's.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError

GETOPT = "a:A:b:c:C:d:D:e:EfF:hi:Ij:J:k:K:l:L:m:M:nN:o:p:P:q:r:S:t:T:u:v:Vw:W:Xxz"
WITH_VALUE = frozenset(letter for letter, after in zip(GETOPT, GETOPT[1:] + " ") if after == ":")
FLAGS = frozenset(GETOPT) - WITH_VALUE - {":"}

OWN = ("--wait", "--debug", "--version", "--help")
LATER = ("-gf", "--explain", "--dry-run", "--json")
"""Words that are reserved and not there yet: refused, for qsub would misread them."""

COMMAND_LINE = "the command line"


class Option(NamedTuple):
    """One option of qsub's; `value` is None for a flag. `source` says where it stands, for messages."""

    letter: str
    value: Optional[str]
    source: str

    def __str__(self) -> str:
        return f"-{self.letter}" if self.value is None else f"-{self.letter} {self.value}"

    def argv(self) -> list[str]:
        """The option as arguments of qsub, the value apart from the letter."""
        return [f"-{self.letter}"] if self.value is None else [f"-{self.letter}", self.value]


class Line(NamedTuple):
    """One command line, or the options of one directive.

    `rest` is the line without our words, for a qsub that is to see it untouched. `problem` says what qsub
    would not understand (None: nothing); it only matters to a job that does not go to qsub as it is. `vm`
    holds the values of our own `-vm`.
    """

    options: tuple[Option, ...]
    operands: tuple[str, ...]
    vm: tuple[Option, ...]
    own: frozenset[str]
    rest: tuple[str, ...]
    problem: Optional[str]

    def last(self, letter: str) -> Optional[Option]:
        """The option that counts where the last one wins."""
        return next((option for option in reversed(self.options) if option.letter == letter), None)


def parse_line(words: list[str], source: str = COMMAND_LINE, *, own_words: bool = True) -> Line:
    """Take a command line (without the program's name) apart.

    `own_words` is false for directives, where only `-vm` is ours. Raises VTorqueError (VT-USAGE) only for
    what is wrong with our own words.
    """
    reader = _Reader(words, source, own_words)
    reader.run()
    return Line(
        options=tuple(reader.options),
        operands=tuple(reader.operands),
        vm=tuple(reader.vm),
        own=frozenset(reader.own),
        rest=tuple(reader.rest),
        problem=reader.problem,
    )


class _Reader:
    """Goes over the words once."""

    def __init__(self, words: list[str], source: str, own_words: bool) -> None:
        self.words = words
        self.at = 0
        self.source = source
        self.own_words = own_words
        self.options: list[Option] = []
        self.operands: list[str] = []
        self.vm: list[Option] = []
        self.own: set[str] = set()
        self.rest: list[str] = []
        self.problem: Optional[str] = None

    def run(self) -> None:
        while self.at < len(self.words):
            word = self.words[self.at]
            self.at += 1
            if word == "-vm":
                self.vm.append(Option("vm", self._vm_value(), self.source))
            elif self.own_words and word in OWN:
                self.own.add(word)
            elif self.own_words and word in LATER:
                raise VTorqueError(f"{word} is not available yet", code=Code.USAGE, hint="see vsub --help")
            else:
                self.rest.append(word)
                if word == "--":
                    self.operands += self.words[self.at :]
                    self.rest += self.words[self.at :]
                    return
                if word == "-" or not word.startswith("-"):
                    self.operands.append(word)
                elif word.startswith("--"):
                    self._wrong(f"the option {word} is not known")
                else:
                    self._bundle(word)

    def _vm_value(self) -> str:
        if self.at == len(self.words):
            raise VTorqueError(
                f"-vm ({self.source}) has no value", code=Code.USAGE, hint="write -vm key=value[,key=value], or -vm off"
            )
        self.at += 1
        return self.words[self.at - 1]

    def _bundle(self, word: str) -> None:
        for position, letter in enumerate(word[1:], 2):
            if letter in FLAGS:
                self.options.append(Option(letter, None, self.source))
            elif letter not in WITH_VALUE:
                self._wrong(f"the option -{letter} is not known")
                return
            else:
                self._with_value(letter, word[position:])
                return

    def _with_value(self, letter: str, attached: str) -> None:
        value = attached
        if not attached:
            if self.at == len(self.words):
                self._wrong(f"the option -{letter} has no value")
                return
            value = self.words[self.at]
            self.rest.append(value)
            self.at += 1
        self.options.append(Option(letter, value, self.source))

    def _wrong(self, text: str) -> None:
        if self.problem is None:
            self.problem = f"{text} ({self.source})"
