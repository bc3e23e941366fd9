"""The last events that a conductor saw and the posts that followed, for debugging (stimulus log).

    log.add(now_s, message, posts)
    log.records()

Bounded, and without any text that a model reads or writes: an entry holds a time, kinds, numbers and
addresses, and keeps no message alive. `add` runs for every message, so it formats nothing. After
dask/distributed's `stimulus_log`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from culturepark.dialogue.slots import Post
from culturepark.messages import Message, TurnStored, UsageStored

EVENTS = 2000
"""Events that are kept, the last ones."""
POSTS = 8
"""Posts that are kept of one event, the first ones; the others are only counted."""

_OF_POST = 4
"""Items of an entry that describe one post."""
_Kind = type | str
_Entry = tuple[Any, ...]
"""When (None if unknown), kind of event, dialogue (-1 if none), turn (0 if none), detail, count of posts; and
of each post address, kind, dialogue and turn. It is flat, as one tuple is made faster than several."""


class EventLog:
    """What a conductor saw last."""

    __slots__ = ("_entries",)

    def __init__(self, most: int = EVENTS) -> None:
        self._entries: deque[_Entry] = deque(maxlen=most)

    def add(self, now_s: float, message: Message | TurnStored | UsageStored, posts: Sequence[Post]) -> None:
        """A message came, and these posts followed."""
        number: int = getattr(message, "number", -1)
        turn: Any = getattr(message, "turn", 0)
        turn = turn if turn.__class__ is int else turn.number
        if len(posts) == 1:  # nearly always; spelled out, as it is faster
            (post,) = posts
            sent = post.message
            due: Any = getattr(sent, "turn", 0)
            due = due if due.__class__ is int else due.number
            self._entries.append(
                (
                    now_s,
                    message.__class__,
                    number,
                    turn,
                    "",
                    1,
                    post.address,
                    sent.__class__,
                    sent.number,
                    due,
                )
            )
        else:
            head = (now_s, message.__class__, number, turn, "", len(posts))
            self._entries.append((*head, *_followed(posts)))

    def note(self, kind: str, detail: str, posts: Sequence[Post] = (), now_s: float | None = None) -> None:
        """Something other than a message came; `detail` is an address, a reason in one word, or a count."""
        self._entries.append((now_s, kind, -1, 0, detail, len(posts), *_followed(posts)))

    def records(self) -> Iterator[dict[str, Any]]:
        """What is kept, oldest first, ready for JSON. What an entry has nothing of is left out."""
        for entry in self._entries:
            at_s, kind, number, turn, detail, count, *rest = entry
            record: dict[str, Any] = {"at_s": at_s, "event": _name(kind)}
            if number != -1:
                record |= {"number": number, "turn": turn}
            if detail:
                record["detail"] = detail
            posts = [rest[at : at + _OF_POST] for at in range(0, len(rest), _OF_POST)]
            if posts:
                record["posts"] = [
                    {"address": address, "kind": _name(sent), "number": of, "turn": due}
                    for address, sent, of, due in posts
                ]
            if count != len(posts):
                record["posts_in_all"] = count
            yield record


def _followed(posts: Sequence[Post]) -> Iterator[_Kind | int]:
    for post in posts[:POSTS]:
        turn: Any = getattr(post.message, "turn", 0)
        yield post.address
        yield post.message.__class__
        yield post.message.number
        yield turn if turn.__class__ is int else turn.number


def _name(kind: Any) -> str:
    return kind if isinstance(kind, str) else kind.__name__
