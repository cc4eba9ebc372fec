"""The offline default corpus: a seeded generator of short simple stories, written for this package.

In the spirit of TinyStories (Eldan and Li 2023, arXiv:2305.07759): the words of a small child, names, places and
objects, a problem and an ending, 60 to 250 words. TinyStories was sampled from large models; this is a grammar. A story
is one of the PLOTS, a sequence of beats; a beat has several phrasings, some beats are left out, and what a phrasing
leaves open (who, what, where) is drawn once for each story from BANKS and RECORDS, so that names, pronouns and objects
stay the same throughout. It is enough to learn English sentences and the shape of a story from, and no more.

All words are in stories.json. The notation of a phrasing: `[a|b]` is a or b, `[|a]` is a or nothing, `{toy}` is the
story's toy, `{toy2}` another one than `{toy}`, `{Toy}` the same with a capital. A beat that starts with "?" can be left
out; where it says "outdoors" it is the beat of that name, and "\n\n" is where a paragraph can end. A bank that is one
string is its words.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmsys import records
from lmsys.config import END_OF_TEXT, require

_DATA = json.loads(Path(__file__).with_name("stories.json").read_text(encoding="utf-8"))


def _bank(value: str | list[str]) -> list[str]:
    return value.split() if isinstance(value, str) else value


_PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}
GIRLS, BOYS, ANIMAL_NAMES, ANIMALS = (_bank(_DATA[key]) for key in ("girls", "boys", "animal_names", "animals"))
GROWN_UPS = _DATA["grown_ups"]  # by kind of hero: [noun, address, pronoun]
BANKS = {
    name: _bank(value) for name, value in _DATA["banks"].items()
}  # what a slot, with or without a digit, draws from
# Several texts that belong together. {place_to} is the field `to` of the story's place; a field that is a list becomes
# a bank of the story, so that {spot}, {spot2} and {spot3} lie in the same place.
RECORDS = _DATA["records"]
OWNER = {"spot": "place"}  # banks that come with a record
OPENING, ENDING = _DATA["opening"], _DATA["ending"]
PLOTS = [  # (kinds of hero that it suits, one of which is drawn; beats)
    (plot["heroes"], [_DATA["outdoors"] if beat == "outdoors" else beat for beat in plot["beats"]])
    for plot in _DATA["plots"]
]


def _pick(rng: random.Random, options: Sequence[Any]) -> Any:
    """One of the options, by random.random alone: its sequence is the one that Python promises to keep."""
    return options[int(rng.random() * len(options))]


@functools.cache
def _parse(template: str) -> tuple[Any, ...]:
    """A phrasing as nodes: text, ('slot', name), or ('choice', alternatives)."""
    pieces = re.findall(r"[\[\]|]|\{\w+\}|[^\[\]|{}]+", template)
    assert "".join(pieces) == template, f"not a slot: {template}"
    nodes: list[Any] = []
    stack: list[tuple[list[Any], list[list[Any]]]] = []  # the nodes around an open bracket, and its alternatives
    for piece in pieces:
        if piece == "[":
            stack.append((nodes, alternatives := []))
            nodes = []
            alternatives.append(nodes)
        elif piece == "|":
            nodes = []
            stack[-1][1].append(nodes)
        elif piece == "]":
            nodes, alternatives = stack.pop()
            nodes.append(("choice", alternatives))
        elif piece[0] == "{":
            nodes.append(("slot", piece[1:-1]))
        else:
            nodes.append(piece)
    assert not stack, f"unbalanced brackets: {template}"
    return tuple(nodes)


class _Slots(dict):
    """What one story has settled so far: slot -> text. A slot is drawn when it is first asked for."""

    def __init__(self, rng: random.Random, hero_kinds: Sequence[str]):
        self.rng = rng
        self.own_banks: dict[str, list[str]] = {}
        self.drawn: set[str] = set()  # records
        self._cast(_pick(rng, hero_kinds))

    def __missing__(self, name: str) -> str:
        if not name.islower():
            text = self[name.lower()]
            return text[0].upper() + text[1:]
        bank = name.rstrip("23")
        record = OWNER.get(bank) or name.partition("_")[0]
        if record in RECORDS and record not in self.drawn:
            self.drawn.add(record)
            for field, value in _pick(self.rng, RECORDS[record]).items():
                if isinstance(value, list):
                    self.own_banks[field] = value
                else:
                    self[f"{record}_{field}"] = self.render(value)
            if name in self:
                return self[name]
        options = self.own_banks.get(bank) or BANKS[bank]
        taken = {self.get(bank), self.get(f"{bank}2"), self.get(f"{bank}3")}
        while (text := self.render(_pick(self.rng, options))) in taken:
            pass
        self[name] = text
        return text

    def _cast(self, kind: str) -> None:
        """Draw the hero (h), a friend (f) and a grown-up (g), with their pronouns."""
        rng, is_animal = self.rng, kind == "animal"
        species: list[str] = []
        names: list[str] = []
        for role in ("", "f_"):
            girl = rng.random() < 0.5
            self[f"{role}he"], self[f"{role}him"], self[f"{role}his"] = _PRONOUNS["she" if girl else "he"]
            while (name := _pick(rng, ANIMAL_NAMES if is_animal else GIRLS if girl else BOYS)) in names:
                pass
            names.append(name)
            options = ANIMALS if is_animal else ("girl",) if girl else ("boy",)
            while (animal := _pick(rng, options)) in species and is_animal:
                pass
            species.append(animal)
        self["h"], self["f"] = names
        self["himself"] = "herself" if self["he"] == "she" else "himself"
        self["species"] = species[0]
        self["f_intro"] = f"a {species[1]} named {names[1]}"
        full = f"{names[1]} the {species[1]}" if is_animal else names[1]
        self["f_full"] = _pick(rng, (self["f_intro"], f"{self['his']} friend {full}", full))
        noun, address, pronoun = _pick(rng, GROWN_UPS[kind])
        self["g"] = self.render(noun)
        self["g_name"] = address
        self["g_he"], self["g_him"], self["g_his"] = _PRONOUNS[pronoun]

    def render(self, template: str) -> str:
        """The text of a phrasing, every choice made and every slot filled."""
        return self._join(_parse(template))

    def _join(self, nodes: Sequence[Any]) -> str:
        out: list[str] = []
        for node in nodes:
            if isinstance(node, str):
                out.append(node)
            elif node[0] == "slot":
                name = node[1]
                if name == "He" and self.rng.random() < 0.2:  # now and then the name
                    name = "h"
                out.append(self[name])
                if name.lower() == "f_full":  # introduced: from here on the name is enough
                    self["f_full"] = self["f"]
            else:
                out.append(self._join(_pick(self.rng, node[1])))
        return "".join(out)


_BEFORE_VOWEL = re.compile(r"\b([Aa])(?= [aeiou])")  # the vocabulary has no unicorn


def story(rng: random.Random) -> str:
    """One story, in one to four paragraphs without a newline at the end; rng decides every word."""
    kinds, beats = _pick(rng, PLOTS)
    slots = _Slots(rng, kinds)
    brevity = 0.15 + 0.7 * rng.random()
    parts: list[str] = []
    for beat in (*OPENING, *beats, *ENDING):
        if beat == "\n\n":
            if parts and rng.random() < 0.75:
                parts.append(beat)
            continue
        if beat[0] == "?":
            if rng.random() < brevity:
                continue
            beat = beat[1:]
        parts.append(slots.render(_pick(rng, beat)))
    text = " ".join(part for part in parts if part).replace("  ", " ").replace(" \n\n ", "\n\n")
    return _BEFORE_VOWEL.sub(r"\1n", text.strip())


def generate(path: str | Path, size_mb: float, seed: int = 0) -> int:
    """Write at least size_mb (1e6 bytes) of stories with END_OF_TEXT after each, atomically; returns their number."""
    require(size_mb > 0, f"size_mb is {size_mb}; it must be positive")
    rng = random.Random(seed)
    count = written = 0
    with records.atomic_path(path) as temporary, temporary.open("wb") as file:
        while written < size_mb * 1e6:
            written += file.write(f"{story(rng)}\n{END_OF_TEXT}\n".encode())
            count += 1
    return count
