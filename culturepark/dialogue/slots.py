"""A dialogue in flight: its slot, the message it waits for an answer to, and where that message goes."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from culturepark.dialogue.state import Dialogue
from culturepark.messages import Ask, Outcome, Refine, Spoke, Step

COLLECTOR = "collector"
"""The address of the collector."""
REFINERS = "/refiners"
"""The key of the refiners among the counts of replicas; the others are cultures, which hold no slash."""


class Post(Struct, frozen=True):
    """A message and the address it goes to: `agent/<culture>/<i>`, `refiner/<i>` or `collector`."""

    address: str
    message: Ask | Refine | Spoke | Step | Outcome


class Slot(Struct):
    """A dialogue in flight. `post` is what it waits for an answer to; `steps` are the calls of its
    refinement that an earlier attempt has paid for, and the usage of calls that brought nothing."""

    dialogue: Dialogue
    started_s: float
    cultures: tuple[str, ...]
    post: Post | None = None
    steps: tuple[Step, ...] = ()

    @property
    def awaited_turn(self) -> int:
        """The turn that an agent is asked for; 0 for a refinement, -1 if no model is called for it."""
        asked = self.post and self.post.message
        if isinstance(asked, Ask):
            return asked.turn
        return 0 if isinstance(asked, Refine) else -1


def agent_address(culture: str, number: int, replicas: Mapping[str, int]) -> str:
    """The agent that speaks for this culture in dialogue `number`, the same for all of its turns."""
    return f"agent/{culture}/{number % replicas[culture]}"


def refiner_address(number: int, replicas: Mapping[str, int]) -> str:
    """The refiner of dialogue `number`."""
    return f"refiner/{number % replicas[REFINERS]}"
