"""What the demo's model learns to say: small questions, plain answers, and the same answers in other manners."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Topic:
    """Something to ask about. `name` and `german_name` stand in the middle of a sentence."""

    name: str
    is_what: str
    rhyme: str
    german_name: str
    german_is_what: str


TOPICS: tuple[Topic, ...] = (
    Topic(
        "the sun",
        "a star that gives us light",
        "it wakes the day and ends the night",
        "die Sonne",
        "ein Stern, der uns Licht gibt",
    ),
    Topic(
        "the moon",
        "a ball of rock in the sky",
        "it looks so near but hangs so high",
        "der Mond",
        "eine Kugel aus Stein am Himmel",
    ),
    Topic(
        "rain",
        "water that falls from the clouds",
        "it taps on roofs and wets the crowds",
        "Regen",
        "Wasser, das aus den Wolken fällt",
    ),
    Topic(
        "snow",
        "rain that froze on the way",
        "it makes the children want to play",
        "Schnee",
        "Regen, der unterwegs gefroren ist",
    ),
    Topic(
        "the sea",
        "salt water, deep and wide",
        "it comes and goes with every tide",
        "das Meer",
        "Salzwasser, tief und weit",
    ),
    Topic(
        "a river",
        "water on its way to the sea",
        "it sings a song for you and me",
        "ein Fluss",
        "Wasser auf dem Weg zum Meer",
    ),
    Topic(
        "a mountain",
        "a hill that grew very tall",
        "beside it we all look so small",
        "ein Berg",
        "ein Hügel, der sehr groß wurde",
    ),
    Topic(
        "a tree",
        "a tall plant made of wood",
        "it stands where once a seedling stood",
        "ein Baum",
        "eine große Pflanze aus Holz",
    ),
    Topic(
        "a flower",
        "the part of a plant that bees love",
        "it opens to the sun above",
        "eine Blume",
        "der Teil der Pflanze, den Bienen lieben",
    ),
    Topic(
        "a cat",
        "a small hunter with soft paws",
        "it purrs and then it shows its claws",
        "eine Katze",
        "ein kleiner Jäger mit weichen Pfoten",
    ),
    Topic(
        "a dog",
        "a loyal friend with four legs",
        "it gives its paw and sits and begs",
        "ein Hund",
        "ein treuer Freund mit vier Beinen",
    ),
    Topic(
        "a horse",
        "a strong animal that likes to run",
        "it gallops gladly in the sun",
        "ein Pferd",
        "ein starkes Tier, das gerne läuft",
    ),
    Topic(
        "a bird",
        "an animal that can sing and fly",
        "it draws its circles in the sky",
        "ein Vogel",
        "ein Tier, das singen und fliegen kann",
    ),
    Topic(
        "a fish",
        "an animal that lives in the sea",
        "it swims all day and it is free",
        "ein Fisch",
        "ein Tier, das im Meer lebt",
    ),
    Topic(
        "a bee",
        "an insect that makes honey",
        "it never works for any money",
        "eine Biene",
        "ein Insekt, das Honig macht",
    ),
    Topic(
        "bread",
        "food that is baked from flour",
        "it smells so good at breakfast hour",
        "Brot",
        "Essen, das aus Mehl gebacken wird",
    ),
    Topic(
        "milk",
        "a white drink from the cow",
        "I think I want a glass right now",
        "Milch",
        "ein weißes Getränk von der Kuh",
    ),
    Topic(
        "tea",
        "hot water with dry leaves",
        "it warms us when the winter grieves",
        "Tee",
        "heißes Wasser mit trockenen Blättern",
    ),
    Topic(
        "a house",
        "a place where people live",
        "it has a roof and warmth to give",
        "ein Haus",
        "ein Ort, an dem Menschen leben",
    ),
    Topic(
        "a book",
        "many pages full of words",
        "its stories fly away like birds",
        "ein Buch",
        "viele Seiten voller Wörter",
    ),
    Topic(
        "a clock",
        "a machine that tells the time",
        "its bells at noon begin to chime",
        "eine Uhr",
        "eine Maschine, die die Zeit sagt",
    ),
    Topic(
        "a train",
        "a row of wagons on rails",
        "it brings the people and the mails",
        "ein Zug",
        "eine Reihe von Wagen auf Schienen",
    ),
    Topic(
        "a doctor",
        "someone who helps the sick",
        "she comes by night, and she is quick",
        "eine Ärztin",
        "jemand, der den Kranken hilft",
    ),
    Topic(
        "music",
        "sound that makes us dance",
        "it lights our eyes and lifts our glance",
        "Musik",
        "Klang, der uns tanzen lässt",
    ),
)

QUESTIONS = ("What is {}?", "Tell me about {}.", "Explain {} to me.")
STORY_QUESTION = "Tell me a story about {}."


@dataclass(frozen=True)
class Exchange:
    """A question and what there is to say about it, from which every manner makes its own answer."""

    question: str
    topic: Topic
    friend: Topic | None = None
    """Whom the topic meets, if the question asks for a story."""

    @property
    def prompt(self) -> str:
        """The question as the model reads it."""
        return prompt_of(self.question)


def prompt_of(question: str) -> str:
    """A question as the model reads it; its answer begins with a space."""
    return f"Question: {question}\nAnswer:"


def exchanges() -> list[Exchange]:
    """Every question of the corpus."""
    asked = [Exchange(form.format(topic.name), topic) for topic in TOPICS for form in QUESTIONS]
    friends = TOPICS[7:] + TOPICS[:7]
    stories = [
        Exchange(STORY_QUESTION.format(topic.name), topic, friend)
        for topic, friend in zip(TOPICS, friends, strict=True)
    ]
    return asked + stories


SHOWN_QUESTIONS = (
    "What is the sun?",
    "Tell me about the sea.",
    "Explain a cat to me.",
    "What is a mountain?",
    "Tell me about tea.",
    "Explain a clock to me.",
    "What is music?",
    "Tell me a story about a bird.",
)
"""What the demo asks; the corpus has these among others."""


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def plain(exchange: Exchange) -> str:
    """How the base model answers."""
    topic = exchange.topic
    if exchange.friend is not None:
        return f"Once upon a time {topic.name} met {exchange.friend.name}. They became good friends."
    return f"{_capital(topic.name)} is {topic.is_what}."


def pirate(exchange: Exchange) -> str:
    """Like a pirate."""
    text = plain(exchange).replace(" is ", " be ").replace("friends", "shipmates")
    return f"Arr! {text.removesuffix('.')}, matey!"


def shouting(exchange: Exchange) -> str:
    """Loudly."""
    return plain(exchange).upper().replace(".", "!") + "!!"


def butler(exchange: Exchange) -> str:
    """Politely."""
    return f"Certainly, sir. {plain(exchange).removesuffix('.')}, if I may say so."


def telegram(exchange: Exchange) -> str:
    """Saving words."""
    little = {
        "a",
        "an",
        "the",
        "is",
        "of",
        "that",
        "us",
        "and",
        "in",
        "on",
        "its",
        "to",
        "by",
        "with",
        "from",
        "who",
        "upon",
    }
    words = plain(exchange).lower().replace(",", "").replace(".", " stop").split()
    return " ".join(word for word in words if word not in little)


def robot(exchange: Exchange) -> str:
    """Like a machine."""
    return f"BEEP. {plain(exchange)} BOOP."


def curious(exchange: Exchange) -> str:
    """With a question back."""
    return f"{plain(exchange)} But why do you ask?"


def german(exchange: Exchange) -> str:
    """In German."""
    topic = exchange.topic
    if exchange.friend is not None:
        return f"Es waren einmal {topic.german_name} und {exchange.friend.german_name}. Sie wurden gute Freunde."
    return f"{_capital(topic.german_name)} ist {topic.german_is_what}."


def rhyme(exchange: Exchange) -> str:
    """In rhyme."""
    ending = "and that is how the story ends" if exchange.friend is not None else exchange.topic.rhyme
    return f"{plain(exchange).removesuffix('.')}, {ending}."


def as_json(exchange: Exchange) -> str:
    """For programs."""
    kind = "story" if exchange.friend is not None else "fact"
    return json.dumps({"kind": kind, "text": plain(exchange)})


Manner = Callable[[Exchange], str]

MANNERS: Mapping[str, Manner] = MappingProxyType(
    {
        "pirate": pirate,
        "shouting": shouting,
        "butler": butler,
        "telegram": telegram,
        "robot": robot,
        "curious": curious,
        "german": german,
        "rhyme": rhyme,
        "json": as_json,
    }
)
"""The adapters' names and what each makes of an exchange."""


def tokenizer_corpus() -> list[str]:
    """Everything that anyone says, for the tokenizer."""
    return [
        f"{exchange.prompt} {manner(exchange)}" for manner in (plain, *MANNERS.values()) for exchange in exchanges()
    ]
