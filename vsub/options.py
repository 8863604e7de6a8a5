"""A command line in the language of TORQUE's `qsub`, taken apart exactly, with `vsub`'s own words taken out.

The grammar is TORQUE 6.1's (`GETOPT_ARGS` in src/cmds/qsub_functions.c) as getopt(3) reads it: flags may be
bundled, a value is attached or the next argument, options may follow the script, `--` ends them. Ours are whole
words where an option may stand (`-vm VALUE` and those of `OWN`); so `-v m` and `-vmx` stay qsub's.

One thing getopt does not tell: qsub looks for the prefix of directives before it calls getopt, in a `-C` that stands
apart from its value and before the script (`find_job_script_index`, seen on TORQUE 6.1.3).
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError

GETOPT = "a:A:b:c:C:d:D:e:EfF:hi:Ij:J:k:K:l:L:m:M:nN:o:p:P:q:r:S:t:T:u:v:Vw:W:Xxz-:"
WITH_VALUE = frozenset(letter for letter, after in zip(GETOPT, GETOPT[1:] + " ") if after == ":")
FLAGS = frozenset(GETOPT) - WITH_VALUE - {":"}

DRY_RUN = "--dry-run"
NATIVE = "--slurm"
"""What stands behind this word is in the batch system's own language; an engine reads it."""
SBATCH = "sbatch"
"""The letter of an option that is sbatch's and has no letter of qsub's: `--name` or `--name=value` is its value."""
OWN = ("--wait", "--explain", DRY_RUN, "--json", "--debug", "--version", "--help", "-gf")
"""Our own words; `-gf` is what `--dry-run` was called in the vTorque of 2018."""

COMMAND_LINE = "the command line"
ONE_SCRIPT = "quote its path; its arguments stand in -F, or behind it after --slurm"
"""What to do about a second script."""


class Option(NamedTuple):
    """One option of qsub's; `value` is None for a flag. `source` says where it stands, for messages."""

    letter: str
    value: Optional[str]
    source: str

    def __str__(self) -> str:
        if self.letter == SBATCH:
            return self.value or ""
        return f"-{self.letter}" if self.value is None else f"-{self.letter} {self.value}"

    def argv(self) -> list[str]:
        """The option as arguments of qsub, the value apart from the letter."""
        return [f"-{self.letter}"] if self.value is None else [f"-{self.letter}", self.value]


class Line(NamedTuple):
    """One command line, or the options of one directive.

    `rest` is the line without our words, for a qsub that is to see it untouched. `problem` says what qsub
    would not understand (None: nothing); it only matters to a job that does not go to qsub as it is. `vm`
    holds the values of our own `-vm`. `prefix` is what marks a directive, None where the line does not say. `native`
    is what stands behind `--slurm`, None for a line without it.
    """

    options: tuple[Option, ...]
    operands: tuple[str, ...]
    vm: tuple[Option, ...]
    own: frozenset[str]
    rest: tuple[str, ...]
    problem: Optional[str]
    prefix: Optional[str] = None
    native: Optional[tuple[str, ...]] = None

    def last(self, letter: str) -> Optional[Option]:
        """The option that counts where the last one wins."""
        return last(self.options, letter)


def last(options: tuple[Option, ...], letter: str) -> Optional[Option]:
    """The option that counts where the last one wins."""
    return next((option for option in reversed(options) if option.letter == letter), None)


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
        prefix=reader.prefix,
        native=reader.native,
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
        self.prefix: Optional[str] = None
        self.native: Optional[tuple[str, ...]] = None

    def run(self) -> None:
        while self.at < len(self.words):
            word = self.words[self.at]
            self.at += 1
            if word == "-vm":
                value, number = self._vm_value(), len(self.vm) + 1
                self.vm.append(Option("vm", value, self.source if number == 1 else f"{self.source}, -vm no. {number}"))
            elif self.own_words and word in OWN:
                self.own.add(DRY_RUN if word == "-gf" else word)
            elif self.own_words and word == NATIVE:
                self.native = tuple(self.words[self.at :])
                return
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
            elif letter not in WITH_VALUE or letter == "-":
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
        if letter == "C" and self.own_words and not self.operands:
            if attached:
                self._wrong(f"qsub takes the word after -C{attached} for the prefix: write -C {attached} apart")
            else:
                self.prefix = value

    def _wrong(self, text: str) -> None:
        if self.problem is None:
            self.problem = f"{text} ({self.source})"
