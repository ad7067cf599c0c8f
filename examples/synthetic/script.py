"""Short dialogues, written from templates, in which every utterance has an emotion.

In a little more than half of the utterances the words reveal the emotion. The others ("Okay.",
"I see.") could be said in any mood: only the voice and the face tell which, or, less surely, what
was said before, since moods last.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from examples.erc.errors import InputError

REVEALING = 0.6
"""Share of the utterances of every emotion whose words reveal it."""

LASTING = 0.6
"""Probability that the next utterance keeps the emotion, where the shares leave the choice."""

LENGTHS = (2, 4)
"""Least and most utterances of a dialogue; the last one of a split may be shorter."""

TOPICS = (
    "the party", "the letter", "the old piano", "the school play", "the lake house", "the soup",
    "the interview", "the garden", "the concert", "the new flat", "the exam", "the wedding",
    "the cat", "the bakery", "the night train", "the red car",
)  # fmt: skip

DAYS = ("Monday", "Tuesday", "Thursday", "Friday", "Sunday")

HOURS = ("eight", "nine", "ten", "noon", "four", "six")

AMBIGUOUS = (
    "Okay.", "Right.", "I see.", "Well then.", "Yes.", "No.", "Oh.", "I know.", "Is that so?",
    "Look at this.", "So it is about {topic}.", "You saw {topic}.",
)  # fmt: skip
"""What can be said in any mood."""

FEELINGS = {
    "anger": ("furious", "angry", "mad"),
    "disgust": ("disgusting", "gross", "revolting"),
    "fear": ("scared", "afraid", "terrified"),
    "joy": ("happy", "glad", "delighted"),
    "neutral": ("usual", "regular", "normal"),
    "sadness": ("sad", "lonely", "heartbroken"),
    "surprise": ("astonished", "amazed", "stunned"),
    "excitement": ("excited", "thrilled", "eager"),
    "frustration": ("frustrated", "annoyed", "fed up"),
}
"""For every emotion the words that fill the gap ``{feeling}``."""

REVEALED = {
    "anger": (
        "I'm so {feeling} about {topic}!",
        "You make me {feeling}, get out!",
        "How dare you ruin {topic}!",
        "Don't you dare blame me for {topic}!",
        "Stop lying to me, I'm {feeling}!",
        "Shut up about {topic}, I'm {feeling}!",
        "I hate you for this!",
        "How dare you, I'm {feeling} with you!",
    ),
    "disgust": (
        "Ew, that is {feeling}!",
        "Yuck, {topic} smells {feeling}.",
        "That is so {feeling}, I feel sick.",
        "Ew, get that {feeling} thing off me.",
        "Yuck, something rotten is in there.",
        "I feel sick, {topic} was {feeling}.",
        "Ugh, what a {feeling} mess.",
        "Ew, I will not touch that, it's {feeling}.",
    ),
    "fear": (
        "I'm {feeling}, please don't leave me alone.",
        "I'm so {feeling} of {topic}.",
        "Help, somebody is at the door!",
        "What if something terrible happens at {topic}?",
        "Please be careful, I'm {feeling}.",
        "Hide, I'm {feeling}!",
        "I'm shaking, I'm that {feeling}.",
        "Something terrible is coming, I'm {feeling}.",
    ),
    "joy": (
        "I'm so {feeling} about {topic}!",
        "What a lovely day, I'm {feeling}.",
        "I love {topic}, it's wonderful!",
        "This is wonderful, I'm {feeling} for you.",
        "Ha, that was so much fun!",
        "I'm {feeling} that you came, thank you!",
        "That's great, I love it!",
        "You were wonderful, I'm so {feeling}.",
    ),
    "neutral": (
        "The {feeling} meeting is on {day} at {hour}.",
        "We meet at {hour}, the {feeling} time.",
        "On {day} I take the {feeling} bus.",
        "I put the keys on the table.",
        "The notes about {topic} are on the table.",
        "The shop opens at {hour} on {day}.",
        "We need the {feeling} forms for {topic}.",
        "It takes about an hour by bus.",
        "They moved {topic} to {day}.",
        "It starts at {hour} on {day}.",
    ),
    "sadness": (
        "I miss him so much, I'm {feeling}.",
        "I feel so {feeling} since {topic}.",
        "I cried all night about {topic}.",
        "She's gone, and I'm {feeling}.",
        "I'm sorry, I'm just {feeling}.",
        "I lost everything, I'm so {feeling}.",
        "I miss her, she's gone.",
        "It makes me {feeling}, I cried again.",
    ),
    "surprise": (
        "What? I'm {feeling}!",
        "Wow, I never expected {topic}!",
        "Oh my god, I'm {feeling}!",
        "No way, you did what?",
        "Wow, really? I'm {feeling}!",
        "What? Nobody told me about {topic}!",
        "Oh my god, {topic} was suddenly there!",
        "No way, I'm {feeling}!",
    ),
    "excitement": (
        "I'm so {feeling}, I can't wait!",
        "I can't wait for {topic}!",
        "Yes, yes, we are going, I'm {feeling}!",
        "This is the best news ever, I'm {feeling}!",
        "Come on, hurry, I'm {feeling}!",
        "We won, we really won!",
        "Guess what, I got {topic}!",
        "It's the best news ever, come on!",
    ),
    "frustration": (
        "I'm {feeling} with {topic}.",
        "Why does this never work?",
        "I tried three times, I'm {feeling}.",
        "This is pointless, I'm {feeling}.",
        "Nobody ever listens to me about {topic}.",
        "I already told you, I'm {feeling}.",
        "I'm {feeling}, this never works.",
        "Three times I waited for {topic}, it's pointless.",
    ),
}
"""For every emotion what is said only in that mood; braces are gaps."""

EMOTIONS = tuple(REVEALED)
"""The emotions of both corpora."""


@dataclass(frozen=True)
class Size:
    """How many utterances a corpus holds.

    Attributes:
        train: Utterances to learn from, at least 1.
        dev: Utterances to select with, at least 1.
        test: Utterances to report on, at least 1.
    """

    train: int = 240
    dev: int = 60
    test: int = 80

    def __post_init__(self) -> None:
        """Check the numbers."""
        for split in ("train", "dev", "test"):
            count = getattr(self, split)
            if count < 1:
                raise InputError(
                    f"{split}: expected at least 1 utterance, got {count}; ask for more"
                )


@dataclass(frozen=True)
class Line:
    """One utterance of a dialogue.

    Attributes:
        speaker: Who speaks.
        emotion: One of :data:`EMOTIONS`.
        text: What is said.
        reveals: Whether the words reveal the emotion.
    """

    speaker: str
    emotion: str
    text: str
    reveals: bool


def write_dialogues(
    count: int,
    shares: Mapping[str, float],
    draw_cast: Callable[[np.random.Generator], tuple[str, ...]],
    random: np.random.Generator,
) -> list[tuple[Line, ...]]:
    """Write the dialogues of one split.

    Args:
        count: Number of utterances in all.
        shares: The share of every emotion; they sum to 1. Each one occurs if there is room.
        draw_cast: Draws the people of one dialogue, at least two.
        random: Source of every choice.

    Returns:
        The dialogues, each a sequence of lines.
    """
    moods = _moods(count, shares, random)
    reveals = _reveals(moods, random)
    dialogues = []
    start = 0
    while start < count:
        stop = min(start + int(random.integers(LENGTHS[0], LENGTHS[1] + 1)), count)
        cast = draw_cast(random)
        topic = TOPICS[random.integers(len(TOPICS))]
        turns = _turns(stop - start, len(cast), random)
        lines = tuple(
            Line(cast[turn], mood, _word(mood, reveal, topic, random), reveal)
            for turn, mood, reveal in zip(
                turns, moods[start:stop], reveals[start:stop], strict=True
            )
        )
        dialogues.append(lines)
        start = stop
    return dialogues


def _moods(count: int, shares: Mapping[str, float], random: np.random.Generator) -> list[str]:
    """The emotions of a split in order: exact shares, and a tendency to last."""
    left = _apportion(count, shares)
    moods: list[str] = []
    while len(moods) < count:
        if moods and left[moods[-1]] and random.uniform() < LASTING:
            mood = moods[-1]
        else:
            names = [name for name in left if left[name]]
            weights = np.array([left[name] for name in names], dtype=np.float64)
            mood = names[random.choice(len(names), p=weights / weights.sum())]
        left[mood] -= 1
        moods.append(mood)
    return moods


def _apportion(count: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers that sum to the count, by largest remainder, none 0 if there is room."""
    least = 1 if count >= len(shares) else 0
    exact = {
        name: (count - least * len(shares)) * Fraction(share) for name, share in shares.items()
    }
    whole = {name: least + int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: int(exact[name]) - exact[name])
    for name in by_remainder[: count - sum(whole.values())]:
        whole[name] += 1
    return whole


def _reveals(moods: list[str], random: np.random.Generator) -> list[bool]:
    """Which utterances reveal their emotion: the same share of every emotion."""
    reveals = [False] * len(moods)
    for mood in sorted(set(moods)):
        rows = random.permutation([row for row, other in enumerate(moods) if other == mood])
        for row in rows[: round(REVEALING * len(rows))]:
            reveals[row] = True
    return reveals


def _turns(count: int, people: int, random: np.random.Generator) -> list[int]:
    """Who speaks when: usually somebody else than before."""
    turns = [0]
    while len(turns) < count:
        step = 0 if random.uniform() < 0.15 else random.integers(1, people)
        turns.append(int(turns[-1] + step) % people)
    return turns


def _word(mood: str, reveals: bool, topic: str, random: np.random.Generator) -> str:
    templates = REVEALED[mood] if reveals else AMBIGUOUS
    text = templates[random.integers(len(templates))].format(
        topic=topic,
        feeling=FEELINGS[mood][random.integers(len(FEELINGS[mood]))],
        day=DAYS[random.integers(len(DAYS))],
        hour=HOURS[random.integers(len(HOURS))],
    )
    return text[0].upper() + text[1:]
