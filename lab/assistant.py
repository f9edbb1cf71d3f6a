"""The data set of the demo: things people say to an assistant on their device, with the intent as the label.

Everything is written for this project: templates of eight domains, three intents each, filled from word lists. The
intents of a domain share their words, and so do some domains ("how long until ..." is a timer, a drive or an egg),
so that no single word gives the label away.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_SLOT = re.compile(r"\{(\w+)\}")

WORDS: dict[str, tuple[str, ...]] = {
    "hour": ("six", "seven", "half past seven", "eight", "nine", "ten", "noon", "five", "midnight"),
    "day": ("today", "tomorrow", "on Monday", "on Friday", "this weekend", "next week", "tonight"),
    "minutes": ("five", "ten", "twelve", "twenty", "thirty", "forty", "ninety"),
    "person": ("my mother", "Anna", "Peter", "the doctor", "my boss", "Maria", "grandfather"),
    "place": ("the station", "the office", "the airport", "Paris", "the library", "the school"),
    "city": ("Paris", "London", "Rome", "Madrid", "Boston", "Vienna", "Dublin", "Oslo"),
    "room": ("the kitchen", "the bedroom", "the hall", "the cellar", "the bathroom", "the study"),
    "food": ("rice", "eggs", "soup", "bread", "fish", "potatoes", "apple pie", "beans"),
    "item": ("milk", "butter", "a new lamp", "two shirts", "coffee", "paper", "soap", "flowers"),
    "event": ("dinner", "the meeting", "my lesson", "the party", "school", "the visit", "work"),
    "song": ("some jazz", "the old songs", "a waltz", "something quiet", "the new record", "opera"),
    "amount": ("two cups", "three pounds", "ten ounces", "half a litre", "a spoon", "one gallon"),
    "unit": ("grams", "litres", "ounces", "pints", "spoons", "cups"),
    "news": (
        "I am late",
        "the train is full",
        "dinner is ready",
        "I found the keys",
        "all is well",
    ),
    "level": ("ten", "half", "the lowest", "the highest", "thirty", "a little more"),
    "sport": ("a run", "a swim", "a long walk", "the stairs", "the bicycle", "ten push ups"),
}

# domain -> intent -> templates
INTENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "time": {
        "alarm": (
            "wake me at {hour} {day}",
            "get me up at {hour} for {event}",
            "I must be out of bed by {hour} {day}",
            "do not let me sleep past {hour}",
            "ring at {hour} so that I am up for {event}",
            "I get up at {hour} {day}, ring me then",
        ),
        "timer": (
            "count down {minutes} minutes",
            "tell me when {minutes} minutes are over",
            "how long until the {minutes} minutes for the {food} are over",
            "ring in {minutes} minutes for the {food}",
            "stop the count down for the {food}",
            "give me {minutes} more minutes for the {food}",
        ),
        "meeting": (
            "put {event} with {person} down for {hour} {day}",
            "when is {event} with {person}",
            "move {event} from {hour} to {hour} {day}",
            "am I free {day} at {hour}",
            "what do I have {day} after {hour}",
            "cancel {event} {day}",
        ),
    },
    "people": {
        "message": (
            "tell {person} that {news}",
            "write to {person} that {news}",
            "let {person} know {news}",
            "answer {person} and say {news}",
            "send word to {person}, {news}",
            "ask {person} about {event} in writing",
        ),
        "call": (
            "ring {person} up",
            "get {person} on the line",
            "I want to speak to {person} {day}",
            "dial the number of {person}",
            "put me through to {person} about {event}",
            "ring {person} back after {event}",
        ),
        "mail": (
            "is there a letter from {person}",
            "read what {person} wrote {day}",
            "did {person} answer about {event}",
            "show what came from {person} {day}",
            "have I got anything new from {person}",
            "open the last one from {person} about {event}",
        ),
    },
    "sound": {
        "music": (
            "play {song}",
            "put on {song} in {room}",
            "I want to hear {song} {day}",
            "let me hear {song} before {event}",
            "play {song} for {minutes} minutes",
            "next one, and then {song}",
        ),
        "volume": (
            "turn {song} down to {level}",
            "make {song} louder in {room}",
            "too loud in {room}, go to {level}",
            "quieter during {event}",
            "set the sound in {room} to {level}",
            "no sound {day} after {hour}",
        ),
        "story": (
            "read me a book for {minutes} minutes",
            "go on with the book where we stopped {day}",
            "tell the children a tale before {event}",
            "I want a chapter of the book in {room}",
            "go back {minutes} minutes in the book",
            "read the children a tale about {city}",
        ),
    },
    "home": {
        "lights": (
            "turn the lamp in {room} down to {level}",
            "it is dark in {room}",
            "make {room} brighter",
            "lamps out in {room} at {hour}",
            "set the lamps in {room} to {level} for {event}",
            "I cannot see a thing in {room}",
        ),
        "heat": (
            "it is cold in {room}",
            "make {room} warmer for {event}",
            "set {room} to twenty degrees at {hour}",
            "turn the stove in {room} down to {level}",
            "too hot in {room}, go to {level}",
            "warm up {room} before {hour} {day}",
        ),
        "door": (
            "is {room} locked",
            "lock up at {hour}",
            "let {person} in at {hour} {day}",
            "who is at the gate {day}",
            "shut {room} after {event}",
            "did {person} come in {day}",
        ),
    },
    "weather": {
        "rain": (
            "do I need an umbrella {day}",
            "will it be wet in {city} {day}",
            "shall I take a coat to {place} {day}",
            "is it going to stay dry for {event}",
            "how likely are showers in {city} at {hour}",
            "will we get wet on the way to {place}",
        ),
        "degrees": (
            "how cold is it in {city} {day}",
            "will it be hot in {city} {day}",
            "how warm will {city} be at {hour}",
            "is it freezing at {place}",
            "what does the glass say in {city} at {hour}",
            "will it be warmer {day} than now in {city}",
        ),
        "wind": (
            "is it stormy in {city} {day}",
            "how hard does it blow in {city} at {hour}",
            "can we sail from {city} {day}",
            "will the storm reach {city} by {hour}",
            "is there a gale on the way to {place} {day}",
            "is it calm enough for a kite at {place} {day}",
        ),
    },
    "shop": {
        "list": (
            "put {item} down, we are out of it",
            "write down {item} and {item}",
            "what did I want to buy {day}",
            "take {item} off again, I have it",
            "we need {item} for {event}",
            "remember {item} when I am in the shop {day}",
        ),
        "order": (
            "buy {item} and have it here {day}",
            "have {item} sent to {place}",
            "get me the same {item} as before",
            "where is my parcel with {item}",
            "send back {item}, it is broken",
            "will {item} arrive before {hour} {day}",
        ),
        "price": (
            "what does {item} cost",
            "is {item} cheaper {day}",
            "how much is {item} in {city}",
            "where is {item} cheapest near {place}",
            "tell me when {item} is under ten",
            "can I pay {minutes} for {item}",
        ),
    },
    "travel": {
        "route": (
            "how do I get to {place}",
            "how long is it to {place} on foot",
            "take me to {place} without the main road",
            "which way to {place} from {place}",
            "how long until I am in {city} by car",
            "where do I turn for {place}",
        ),
        "booking": (
            "two seats to {city} {day}",
            "book me the train to {city} at {hour}",
            "I want to fly to {city} {day}",
            "get {person} a seat to {city}",
            "change my seat to {city} from {day} to {day}",
            "what does it cost to go to {city} {day}",
        ),
        "traffic": (
            "is the road to {place} clear",
            "am I late if I leave for {place} at {hour}",
            "why is the train to {city} late",
            "are the roads full {day} near {place}",
            "is there an accident on the way to {place}",
            "when should I leave to be at {place} by {hour}",
        ),
    },
    "body": {
        "recipe": (
            "how long do I boil {food}",
            "what can I cook with {food} and {food}",
            "what goes into {food}",
            "how do I make {food} for {minutes} people",
            "next step for the {food}",
            "what shall I cook with {food} {day}",
        ),
        "convert": (
            "how many {unit} are {amount}",
            "{amount} in {unit}",
            "what is {amount} of {food} in {unit}",
            "turn {amount} into {unit}",
            "I have {amount} of {food}, how many {unit} is that",
            "is {amount} more than {minutes} {unit}",
        ),
        "exercise": (
            "I did {sport} for {minutes} minutes",
            "how far did I go {day}",
            "write down {sport} {day}",
            "did I do {sport} {day}",
            "start {sport} for {minutes} minutes",
            "how much did {sport} burn {day}",
        ),
    },
}

BEFORE = ("", "", "", "", "please ", "hey, ", "could you check, ", "quick, ", "so, ", "one thing, ")
AFTER = ("", "", "", "", " please", " now", " if you can", ", thank you", ", will you", " again")

LABELS: tuple[str, ...] = tuple(sorted(i for intents in INTENTS.values() for i in intents))
DOMAINS: tuple[str, ...] = tuple(INTENTS)


@dataclass(frozen=True)
class Utterance:
    """One row: what was said, what was meant, in which part of life."""

    text: str
    intent: str
    domain: str


def _fill(template: str, rng: np.random.Generator) -> str:
    def word(match: re.Match[str]) -> str:
        choices = WORDS[match[1]]
        return choices[int(rng.integers(len(choices)))]

    body = _SLOT.sub(word, template)
    return f"{BEFORE[rng.integers(len(BEFORE))]}{body}{AFTER[rng.integers(len(AFTER))]}"


def _endless(intent: str, templates: tuple[str, ...], rng: np.random.Generator) -> Iterator[str]:
    """Distinct utterances of one intent, every template in turn; ends when they run out."""
    seen: set[str] = set()
    misses = 0
    while misses < 500:
        for template in templates:
            text = _fill(template, rng)
            if text in seen:
                misses += 1
                continue
            seen.add(text)
            misses = 0
            yield text


def generate(per_intent: int, seed: int) -> list[Utterance]:
    """Make the data set.

    Parameters
    ----------
    per_intent : int
        Rows of each of the 24 intents.
    seed : int
        The same seed gives the same rows.

    Returns
    -------
    list of Utterance, 24 * per_intent long, no text twice, shuffled

    Raises
    ------
    ValueError
        When the templates of an intent do not give that many distinct rows.
    """
    rng = np.random.default_rng(seed)
    rows: list[Utterance] = []
    taken: set[str] = set()
    for domain, intents in INTENTS.items():
        for intent, templates in intents.items():
            found = 0
            for text in _endless(intent, templates, rng):
                if found == per_intent:
                    break
                if text not in taken:
                    taken.add(text)
                    rows.append(Utterance(text, intent, domain))
                    found += 1
            if found < per_intent:
                raise ValueError(f"{intent}: {found} distinct rows, {per_intent} wanted")
    return [rows[i] for i in rng.permutation(len(rows))]
