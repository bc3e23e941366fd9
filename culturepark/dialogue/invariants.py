"""What must hold of a dialogue in flight, whatever messages came in whatever order.

Each function yields what does not hold, in words that name numbers, kinds and addresses and repeat no text of
a model. The conductor's `validate` puts them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from culturepark.dialogue.slots import COLLECTOR, Post, Slot, agent_address, refiner_address
from culturepark.dialogue.state import Dialogue
from culturepark.messages import Ask, Outcome, Refine, Spoke
from culturepark.models.errors import DOUBTFUL


class InvariantViolation(AssertionError):
    """What a conductor holds contradicts itself: a fault of culturepark's own."""


def broken_in_dialogue(dialogue: Dialogue, most: int) -> Iterator[str]:
    """`most` is how many turns the plan gives it. A dialogue may end earlier, by its health."""
    turns = dialogue.turns
    for at, turn in enumerate(turns):
        if turn.number != at + 1:
            yield f"turn {turn.number} is in the place of turn {at + 1}"
        if turn.speaker != at % dialogue.speakers:
            yield f"turn {at + 1} is by speaker {turn.speaker}"
    if not len(turns) <= dialogue.utterances <= most:
        yield f"it has {len(turns)} turns of {dialogue.utterances}, and {most} are planned"


def broken_in_slot(
    number: int, slot: Slot, term: int, replicas: Mapping[str, int], *, refines: bool, halted: bool
) -> Iterator[str]:
    """What a dialogue in flight waits for has to be what is due next, and on its way to the right address."""
    dialogue, post = slot.dialogue, slot.post
    if len(slot.cultures) != dialogue.speakers:
        yield f"it has {dialogue.speakers} speakers of {len(slot.cultures)} cultures"
    if any(step.number != number for step in slot.steps):
        yield "it holds a step of another dialogue"
    if post is None:
        yield "it waits for nothing"
        return
    message, due = post.message, COLLECTOR
    if message.number != number:
        yield f"its post is of dialogue {message.number}"
    if isinstance(message, Ask | Refine | Spoke) and message.term != term:
        yield f"its {type(message).__name__} is of term {message.term}, and this is {term}"
    if isinstance(message, Ask):
        due = agent_address(slot.cultures[dialogue.next_speaker], number, replicas)
        if dialogue.ended:
            yield "it has ended, and a turn is asked for"
        if message.turn != dialogue.next_turn:
            yield f"turn {message.turn} is asked for, and {dialogue.next_turn} is due"
    elif isinstance(message, Spoke):
        turn = message.turn
        # After a halt, a turn that is on disk already stays where it is: nothing follows from it.
        if not (halted and turn.number == len(dialogue.turns)):
            if dialogue.ended:
                yield "it has ended, and a turn goes to the disk"
            if (turn.number, turn.speaker) != (dialogue.next_turn, dialogue.next_speaker):
                what = f"turn {turn.number} of speaker {turn.speaker} goes to the disk"
                yield f"{what}, and turn {dialogue.next_turn} of speaker {dialogue.next_speaker} is due"
    elif isinstance(message, Refine):
        due = refiner_address(number, replicas)
        if not refines:
            yield "it is refined in a run that refines nothing"
        if not (dialogue.ended and len(message.turns) == len(dialogue.turns) == dialogue.utterances):
            yield f"{len(message.turns)} turns of {dialogue.utterances} are refined"
    elif isinstance(message, Outcome):
        if not dialogue.ended:
            yield "it has not ended, and its outcome goes to the disk"
        if not message.failed and (refines or len(message.turns) != dialogue.utterances):
            yield "it finishes without its last turn or its refinement"
    else:
        yield f"it waits for a {type(message).__name__}"
    if post.address != due:
        yield f"its {type(message).__name__} goes to {post.address}, and {due} is right"


def broken_in_doubt(number: int, slot: Slot, post: Post) -> Iterator[str]:
    """Of a dialogue whose failure may be an outage's: only its outcome is left to be stored."""
    message = post.message
    if not isinstance(message, Outcome) or message.number != number or post.address != COLLECTOR:
        yield "what waits in doubt is not its outcome"
    elif message.failed not in DOUBTFUL:
        yield f"its failure `{message.failed}` is in no doubt"
    if not slot.dialogue.ended:
        yield "it has failed in doubt, and has not ended"
