r"""Names of users and queues that root's code takes: they stand in records, paths, logs, and accounts of guests.

Directory services give names such as `LAB\carol`, `LAB+carol` (winbind), `carol@lab.example.org` (SSSD) and `host$`.
"""

from __future__ import annotations

USER = r"[A-Za-z0-9_](?:[A-Za-z0-9_.@+\\-]{0,62}[A-Za-z0-9_.@+-])?\$?"
r"""A user, as a regular expression. None with a blank, `:` or `/`, which an account of a guest cannot have, and none
that ends with a backslash, which ssh(1) does not take."""
USERS = r"letters, digits, _ . @ + - and \ (64 at most, the first a letter, a digit or _), and a $ at the end"
"""The same in words."""
QUEUES = "letters, digits, _ . @ + - and : (64 at most, the first a letter, a digit or _)"
"""What names of queues, of Slurm's partitions, consist of."""
_MAX_QUEUE = 64
_IN_QUEUES = dict.fromkeys(map(ord, "_.@+-:"), "a")


def is_queue(text: str) -> bool:
    """Whether this is the name of a queue that is taken. Without a regular expression: each hook asks once."""
    plain = len(text) <= _MAX_QUEUE and text.isascii() and text.translate(_IN_QUEUES).isalnum()
    return plain and text[0] not in ".@+-:"
