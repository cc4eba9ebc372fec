"""The offline default corpus: a seeded generator of short simple stories, written for this package.

In the spirit of TinyStories (Eldan and Li 2023, arXiv:2305.07759): the words of a small child, names, places and
objects, a problem and an ending, 60 to 250 words. TinyStories was sampled from large models; this is a grammar. A story is
one of the PLOTS, a sequence of beats; a beat has several phrasings, some beats are left out, and what a phrasing
leaves open (who, what, where) is drawn once for each story from BANKS and RECORDS, so that names, pronouns and objects
stay the same throughout. It is enough to learn English sentences and the shape of a story from, and no more.

The notation of a phrasing: `[a|b]` is a or b, `[|a]` is a or nothing, `{toy}` is the story's toy, `{toy2}` another one
than `{toy}`, `{Toy}` the same with a capital. A beat that starts with '?' can be left out.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmsys import records
from lmsys.config import END_OF_TEXT, require

# --- Who, what, where -------------------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_GIRL, _BOY = ("she", "her", "her"), ("he", "him", "his")

GIRLS = _words(
    "Lily Mia Anna Sara Lucy Emma Ella Rosie Daisy Molly Zoe Amy Nora Ruby Lola Maya Ivy Jane Kate Nina Eva Grace Hana "
    "Alice Clara June Tara Beth Nell Leah Rita Zara Kim Sofia Fay Wren Olive Penny Dora Mary"
)
BOYS = _words(
    "Tom Tim Ben Max Sam Jack Leo Finn Noah Billy Jake Bob Joe Dan Luke Oscar Toby Harry Adam Eli Charlie Fred Peter "
    "Theo Ravi Omar Kai Milo Ned Hugo Otto Paul Ken Ali Henry George Dev Jay Ray Simon"
)
ANIMAL_NAMES = _words(
    "Pip Dot Nibbles Biscuit Coco Pebble Button Tilly Bramble Hazel Mossy Peanut Patch Bubbles Sunny Ginger Clover Spot "
    "Chip Muffin Rusty Acorn Pepper Teddy Willow Bean Momo Tufty Poppy Gus Bo Fudge Maple Twig Benny Lulu"
)
ANIMALS = _words(
    "mouse rabbit bear fox squirrel duck frog hedgehog cat puppy turtle pig lamb goat monkey elephant pony penguin "
    "beaver otter raccoon lion deer mole badger panda"
)
GROWN_UPS = {
    "child": (
        ("{his} mom", "Mom", _GIRL),
        ("{his} dad", "Dad", _BOY),
        ("{his} grandma", "Grandma", _GIRL),
        ("{his} grandpa", "Grandpa", _BOY),
        ("{his} aunt", "Auntie", _GIRL),
        ("{his} uncle", "Uncle", _BOY),
    ),
    "animal": (
        ("{his} mom", "Mom", _GIRL),
        ("{his} dad", "Dad", _BOY),
        ("{his} grandma", "Grandma", _GIRL),
        ("{his} grandpa", "Grandpa", _BOY),
        ("the [wise|kind] old owl", "Mr. Owl", _BOY),
        ("the [old|gentle] gray goose", "Mrs. Goose", _GIRL),
    ),
}

# One text each. A slot of the same name, with or without a digit, draws from it.
BANKS = {
    "trait": _words(
        "kind happy clever curious cheerful playful gentle little small funny friendly quiet busy silly sweet lively young "
        "good smart polite bright merry"
    ),
    "home": (
        "in a small house",
        "near the woods",
        "at the edge of a forest",
        "in a little village",
        "by the sea",
        "on top of a green hill",
        "next to a big garden",
        "by a small stream",
        "at the end of a long road",
        "close to an old mill",
    ),
    "land": (
        "a small village",
        "a quiet valley",
        "a land far away",
        "a green valley",
        "a little town by the sea",
        "a warm and sunny place",
        "a cozy corner of the woods",
        "a place with many trees",
        "a small house on a hill",
    ),
    "hobby": (
        "sing",
        "dance",
        "run fast",
        "play outside",
        "look at the clouds",
        "count the stars",
        "listen to stories",
        "tell jokes",
        "make new friends",
        "ask questions",
        "help others",
        "pick flowers",
        "splash in puddles",
        "roll down the hill",
        "watch the birds",
        "chase butterflies",
        "collect shiny stones",
        "play hide-and-seek",
        "eat sweet berries",
        "hum little songs",
        "look for bugs",
        "explore new places",
        "nap in the sun",
        "make up games",
        "jump over logs",
        "walk in the rain",
        "talk to the trees",
        "wake up early",
    ),
    "day": (
        "One day",
        "One sunny day",
        "One morning",
        "One bright morning",
        "One afternoon",
        "One warm afternoon",
        "One windy day",
        "One fine day",
        "One spring morning",
        "One summer day",
        "One cool day",
        "Early one morning",
        "One Saturday",
        "One Sunday",
        "One quiet morning",
    ),
    "toy": (
        "ball",
        "doll",
        "toy car",
        "teddy bear",
        "drum",
        "toy boat",
        "toy train",
        "whistle",
        "puppet",
        "spinning top",
        "toy robot",
        "yo-yo",
        "toy truck",
        "bell",
        "paper crown",
        "toy horse",
        "flag",
        "toy duck",
        "jump rope",
        "toy plane",
    ),
    "look": (
        "red",
        "blue",
        "green",
        "yellow",
        "shiny",
        "new",
        "old",
        "big",
        "little",
        "pretty",
        "purple",
        "orange",
        "bright",
        "special",
        "shiny red",
        "bright blue",
        "nice",
        "striped",
        "golden",
        "pink",
    ),
    "color": _words("red blue green yellow orange purple pink white brown golden gray silver"),
    "treat": (
        "cake",
        "pie",
        "cookie",
        "muffin",
        "sandwich",
        "banana",
        "apple",
        "pear",
        "peach",
        "pancake",
        "bun",
        "orange",
        "carrot",
        "slice of bread",
        "plum",
    ),
    "treats": (
        "cookies",
        "berries",
        "cakes",
        "cherries",
        "grapes",
        "plums",
        "muffins",
        "candies",
        "strawberries",
        "pancakes",
        "honey buns",
        "nuts",
        "pears",
        "apples",
        "biscuits",
        "jam tarts",
    ),
    "flower": ("rose", "daisy", "tulip", "sunflower", "yellow flower", "white flower", "violet", "poppy", "lily"),
    "junk": (
        "an old shoe",
        "a snail",
        "a pile of leaves",
        "a sleepy cat",
        "a feather",
        "a round stone",
        "a broken cup",
        "a worm",
        "a wet sock",
        "a green bug",
        "a rusty can",
        "a bird's nest",
        "a lost glove",
        "some dry grass",
        "a long stick",
        "a beetle",
        "an empty box",
        "a button",
    ),
    "dream": (
        "flying over the sea",
        "the moon",
        "a big parade",
        "new adventures",
        "a sky full of kites",
        "sweet cakes",
        "dancing stars",
        "a warm summer day",
        "a ship with white sails",
        "{place_in}",
        "a garden full of flowers",
    ),
    "joy": (
        "smiled a big smile",
        "laughed out loud",
        "jumped up and down",
        "danced around",
        "clapped {his} hands",
        "felt warm inside",
        "could not stop smiling",
        "cheered",
        "was so happy",
        "grinned from ear to ear",
    ),
    "sadness": (
        "{h} felt very sad.",
        "A tear rolled down {h}'s face.",
        "{h} wanted to cry.",
        "{h}'s heart was heavy.",
        "{h} sat down and sighed.",
        "{h} began to cry.",
        "{h} did not know what to do.",
        "{h}'s eyes filled with tears.",
        "{h} hung {his} head.",
        "{h} swallowed hard.",
        "{h} felt small and alone.",
        "{h}'s lip began to shake.",
        "{h} looked down at the ground.",
        "It made {h} feel sad inside.",
    ),
    "oh": ("Oh no", "Oh dear", "Uh-oh", "Oh my", "Help"),
    "yes": ("Yes", "Of course", "Sure", "Okay", "All right", "I would love to", "Yes, please"),
    "hooray": ("Hooray", "Yay", "Hurray", "Wow", "Yippee", "Oh, yes"),
    "goodfriend": ("a good friend", "a true friend", "the best friend", "so kind", "very kind", "a wonderful friend"),
    "animalbaby": (
        "baby bird",
        "kitten",
        "duckling",
        "bunny",
        "little owl",
        "chick",
        "baby squirrel",
        "lost lamb",
        "tiny mouse",
        "little goose",
        "baby deer",
        "piglet",
    ),
    "seed": ("sunflower", "apple", "pumpkin", "bean", "carrot", "tomato", "pea", "melon", "strawberry", "corn"),
    "weather": (
        "The sun was warm.",
        "The sky was blue.",
        "White clouds sailed by.",
        "A soft wind was blowing.",
        "Birds sang in the trees.",
        "The air smelled of flowers.",
        "Bees hummed in the grass.",
        "The grass was still wet.",
        "It was not too hot and not too cold.",
        "The leaves danced in the wind.",
    ),
    "while": ("a long time", "many days", "hours", "two whole days", "a whole week", "almost a week", "three days"),
    "later": (
        "one day",
        "one morning",
        "one evening",
        "one Sunday",
        "one afternoon",
        "the next week",
        "some days later",
    ),
    "fjoy": (
        "jumped for joy",
        "laughed out loud",
        "had tears of joy in {f_his} eyes",
        "smiled a big smile",
        "held it up to the light",
        "could hardly believe it",
    ),
    "tale": (
        "a brave mouse",
        "a talking fish",
        "a dragon who loved soup",
        "a king without a crown",
        "a sheep that wanted to fly",
        "a pirate who was afraid of the sea",
        "a sleepy bear",
        "a clever hen",
        "a snail that won a race",
        "a star that fell into a well",
    ),
    "landmark": (
        "mill",
        "fallen tree",
        "red gate",
        "stone well",
        "scarecrow",
        "broken cart",
        "crooked tree",
        "white rock",
    ),
    "petname": ("Chirp", "Sky", "Tweet", "Feather", "Cloud", "Sparrow", "Peep", "Song", "Blue", "Whisper"),
    "fruit": _words(
        "berries cherries grapes plums strawberries nuts pears apples mushrooms blueberries raspberries figs"
    ),
}

# Several texts that belong together. {place_to} is the field `to` of the story's place; a field that is a tuple becomes
# a bank of the story, so that {spot}, {spot2} and {spot3} lie in the same place.
RECORDS = {
    "place": (
        {
            "to": "to the park",
            "in": "in the park",
            "sight": "children were playing on the swings",
            "spot": ("under the bench", "behind the slide", "in the tall grass", "next to the pond", "by the gate"),
        },
        {
            "to": "to the garden",
            "in": "in the garden",
            "sight": "the roses were open",
            "spot": (
                "under the apple tree",
                "behind the fence",
                "between the roses",
                "in the wheelbarrow",
                "near the well",
            ),
        },
        {
            "to": "to the forest",
            "in": "in the forest",
            "sight": "the light fell through the leaves",
            "spot": (
                "under a log",
                "behind a big oak",
                "in a pile of leaves",
                "near the stream",
                "inside a hollow tree",
            ),
        },
        {
            "to": "to the beach",
            "in": "at the beach",
            "sight": "small waves rolled over the sand",
            "spot": ("behind a rock", "in the sand", "under a boat", "between the shells", "next to a tall dune"),
        },
        {
            "to": "to the meadow",
            "in": "in the meadow",
            "sight": "butterflies were everywhere",
            "spot": ("in the high grass", "under a bush", "behind a stone wall", "among the flowers", "by the brook"),
        },
        {
            "to": "up the hill",
            "in": "on the hill",
            "sight": "one could see the whole valley",
            "spot": (
                "behind a big stone",
                "under the lone tree",
                "in a small hole",
                "near the old tower",
                "in the bushes",
            ),
        },
        {
            "to": "down to the river",
            "in": "by the river",
            "sight": "little fish swam in the clear water",
            "spot": (
                "under the bridge",
                "between two rocks",
                "in the reeds",
                "behind a willow tree",
                "on the muddy bank",
            ),
        },
        {
            "to": "to the farm",
            "in": "on the farm",
            "sight": "the hens were looking for corn",
            "spot": ("behind the barn", "in the hay", "under the cart", "next to the pig pen", "by the milk cans"),
        },
        {
            "to": "to the lake",
            "in": "at the lake",
            "sight": "two swans swam slowly by",
            "spot": (
                "under the pier",
                "in an old boat",
                "behind the cabin",
                "between the lilies",
                "near the tall reeds",
            ),
        },
        {
            "to": "to the market square",
            "in": "in the market square",
            "sight": "people were selling fruit and bread",
            "spot": (
                "under a table",
                "behind the fountain",
                "beside a basket",
                "near the bread cart",
                "on the church steps",
            ),
        },
    ),
    "fear": (
        {
            "of": "the dark",
            "sign": "Every night, {he} pulled the blanket over {his} head",
            "test": "a cloud covered the moon and it became very dark",
            "truth": "The dark is only the day asleep",
            "step": "closed {his} eyes and counted to ten",
            "after": "the dark felt soft and quiet",
        },
        {
            "of": "thunder",
            "sign": "When the sky was gray, {he} hid under the table",
            "test": "a storm came and the thunder went boom",
            "truth": "Thunder is only the clouds bumping their heads",
            "step": "counted the time between the light and the boom",
            "after": "the storm sounded like a big drum",
        },
        {
            "of": "deep water",
            "sign": "{He} never put more than one toe in the lake",
            "test": "all the others jumped into the cool water",
            "truth": "The water will hold you up if you let it",
            "step": "held on tight and kicked {his} legs",
            "after": "{he} was splashing all around",
        },
        {
            "of": "high places",
            "sign": "{He} always stayed at the bottom of the hill",
            "test": "the others climbed to the top of the tall rock",
            "truth": "Look at where you put your feet, one step at a time",
            "step": "took one step, and then one more",
            "after": "{he} stood at the top and saw the whole world",
        },
        {
            "of": "loud noises",
            "sign": "{He} covered {his} ears when a door went bang",
            "test": "a band came down the road with a big drum",
            "truth": "A noise is not so bad when you know where it comes from",
            "step": "walked up to the drum and tapped it once",
            "after": "{he} was beating the drum with the band",
        },
        {
            "of": "the tall slide",
            "sign": "{He} only ever watched the others go down",
            "test": "it was {his} turn and everyone was waiting",
            "truth": "Being scared and doing it anyway is what brave means",
            "step": "sat down, took a deep breath and let go",
            "after": "{he} was back in line to slide again",
        },
        {
            "of": "the old bridge",
            "sign": "{He} always took the long way home",
            "test": "it was late and the bridge was the only way home",
            "truth": "The bridge creaks, but it is strong",
            "step": "held on to the rope and put one foot on the wood",
            "after": "{he} was on the other side",
        },
        {
            "of": "spiders",
            "sign": "{He} ran away when {he} saw even a very small one",
            "test": "a spider sat right on {his} door",
            "truth": "That little spider is more afraid of you than you are of it",
            "step": "moved closer and looked at its tiny legs",
            "after": "{he} saw how pretty its web was",
        },
    ),
    "skill": (
        {
            "to": "ride a bike",
            "ing": "riding",
            "fail": "fell into a bush",
            "how": "Look ahead and keep your feet moving",
        },
        {"to": "swim", "ing": "swimming", "fail": "got water up {his} nose", "how": "Kick slowly and breathe"},
        {
            "to": "whistle",
            "ing": "whistling",
            "fail": "made only a windy sound",
            "how": "Make your mouth small and blow softly",
        },
        {"to": "skate", "ing": "skating", "fail": "landed on {his} bottom", "how": "Bend your knees and do not hurry"},
        {
            "to": "fly a kite",
            "ing": "flying the kite",
            "fail": "saw the kite fall down on its nose",
            "how": "Wait for the wind, then run",
        },
        {
            "to": "jump rope",
            "ing": "jumping",
            "fail": "got {his} feet caught in the rope",
            "how": "Listen to the rope and jump when it claps",
        },
        {
            "to": "play the drum",
            "ing": "drumming",
            "fail": "dropped both sticks",
            "how": "Start slow, like a sleepy heart",
        },
        {
            "to": "stand on one leg",
            "ing": "standing on one leg",
            "fail": "tipped over like a tree",
            "how": "Look at one thing that does not move",
        },
        {
            "to": "paddle a boat",
            "ing": "paddling",
            "fail": "went around in a circle",
            "how": "One push on the left, then one push on the right",
        },
        {
            "to": "climb the rope",
            "ing": "climbing",
            "fail": "slid right back down",
            "how": "Hold on with your feet, too",
        },
        {
            "to": "throw a ball far",
            "ing": "throwing",
            "fail": "hit {his} own foot",
            "how": "Step forward and let your arm swing",
        },
        {
            "to": "tie a knot",
            "ing": "tying knots",
            "fail": "tied {his} finger to the string",
            "how": "Over, under, and pull it through",
        },
    ),
    "high": (
        {"thing": "kite", "do": "fly it", "got": "A strong wind took it", "where": "in a tall tree", "top": "tree"},
        {
            "thing": "ball",
            "do": "throw it up in the air",
            "got": "It went up and up",
            "where": "on the roof of the barn",
            "top": "roof",
        },
        {
            "thing": "hat",
            "do": "wear it every day",
            "got": "The wind blew it off {his} head",
            "where": "on a high branch",
            "top": "branch",
        },
        {
            "thing": "balloon",
            "do": "hold it by the string",
            "got": "The string slipped out of {his} hand",
            "where": "at the top of a pole",
            "top": "pole",
        },
        {
            "thing": "toy plane",
            "do": "make it fly",
            "got": "It made a big turn",
            "where": "on top of the old wall",
            "top": "wall",
        },
        {
            "thing": "scarf",
            "do": "spin around with it",
            "got": "A gust of wind pulled it away",
            "where": "in the top of a pine tree",
            "top": "tree",
        },
    ),
    "tool": (
        {"name": "a long ladder", "use": "set it up and climbed slowly to the top"},
        {"name": "a long pole", "use": "lifted the pole and gave a gentle push"},
        {"name": "a fishing rod", "use": "threw the line and pulled softly"},
        {"name": "a broom", "use": "reached up with the broom and swept it down"},
        {"name": "a box to stand on", "use": "climbed on the box and stretched as far as possible"},
    ),
    "broken": (
        {"thing": "vase", "by": "running in the house", "sound": "Crash"},
        {"thing": "blue plate", "by": "playing ball in the kitchen", "sound": "Smash"},
        {"thing": "lamp", "by": "jumping on the chairs", "sound": "Crack"},
        {"thing": "teapot", "by": "spinning around near the table", "sound": "Crash"},
        {"thing": "window", "by": "throwing stones", "sound": "Clink"},
        {"thing": "flower pot", "by": "climbing on the shelf", "sound": "Bang"},
        {"thing": "mirror", "by": "swinging a stick inside", "sound": "Crack"},
        {"thing": "honey jar", "by": "reaching for the top shelf", "sound": "Splat"},
    ),
    "gift": (
        {
            "new": "a card with a big heart on it",
            "it": "card",
            "make": "took paper and paint",
            "part": "drew and colored very carefully",
        },
        {
            "new": "a necklace of little shells",
            "it": "necklace",
            "make": "looked for shells",
            "part": "put them on a string, one by one",
        },
        {"new": "a crown of flowers", "it": "crown", "make": "picked fresh flowers", "part": "tied the stems together"},
        {
            "new": "a boat made of wood",
            "it": "boat",
            "make": "found a piece of soft wood",
            "part": "added a leaf for a sail",
        },
        {"new": "a song", "it": "song", "make": "sat under a tree to think", "part": "made up one line after another"},
        {
            "new": "a warm scarf",
            "it": "scarf",
            "make": "asked {g} for some wool",
            "part": "made knot after knot, every evening",
        },
        {
            "new": "a picture of the two of them",
            "it": "picture",
            "make": "found some colored chalk",
            "part": "drew two big smiles",
        },
        {
            "new": "a basket of wild berries",
            "it": "basket",
            "make": "wove a basket from grass",
            "part": "filled it to the top",
        },
    ),
    "build": (
        {
            "a": "a sandcastle",
            "it": "castle",
            "of": "wet sand",
            "ruin": "a big wave washed it away",
            "fix": "farther from the water",
        },
        {
            "a": "a tall tower",
            "it": "tower",
            "of": "wooden blocks",
            "ruin": "it leaned to one side and fell down",
            "fix": "with the big blocks at the bottom",
        },
        {
            "a": "a tree house",
            "it": "house",
            "of": "old boards",
            "ruin": "the floor came loose and dropped down",
            "fix": "with strong ropes",
        },
        {
            "a": "a little bridge",
            "it": "bridge",
            "of": "sticks",
            "ruin": "the stream carried it off",
            "fix": "with heavy stones on both sides",
        },
        {
            "a": "a snowman",
            "it": "snowman",
            "of": "fresh snow",
            "ruin": "its head rolled off and broke",
            "fix": "with a smaller head",
        },
        {"a": "a raft", "it": "raft", "of": "logs", "ruin": "it came apart in the water", "fix": "with better knots"},
        {
            "a": "a fort",
            "it": "fort",
            "of": "blankets and chairs",
            "ruin": "the roof fell on {his} head",
            "fix": "with a broom in the middle",
        },
    ),
    "danger": (
        {
            "warn": "Do not walk on the ice",
            "why": "it is thin",
            "act": "put one foot on the ice, and then the other",
            "bad": "The ice cracked and {his} feet fell into the cold water",
            "save": "held out a long branch and pulled {him} out",
        },
        {
            "warn": "Stay on the path",
            "why": "it is easy to get lost",
            "act": "ran after a butterfly, away from the path",
            "bad": "Soon all the trees looked the same and {he} was lost",
            "save": "heard {him} call and followed the sound",
        },
        {
            "warn": "Do not go near the mud",
            "why": "it is deep",
            "act": "jumped right into the mud",
            "bad": "{His} feet sank and {he} could not move",
            "save": "threw {him} a rope and pulled hard",
        },
        {
            "warn": "Do not touch the beehive",
            "why": "the bees will be angry",
            "act": "poked the hive with a stick",
            "bad": "The bees came out and buzzed around {his} head",
            "save": "led {him} quickly into the pond, up to the nose",
        },
        {
            "warn": "Do not climb the old tree",
            "why": "its branches are weak",
            "act": "climbed up to the highest branch",
            "bad": "The branch began to crack and {he} was too scared to come down",
            "save": "stood below and caught {him}",
        },
        {
            "warn": "Do not open the gate",
            "why": "the goats will run away",
            "act": "lifted the latch just to peek",
            "bad": "All the goats ran out and down the road",
            "save": "came with a bell and called the goats back",
        },
    ),
    "wish": (
        {
            "say": "I wish I had all the cake in the world",
            "got": "Cake fell from the sky, and more cake, and more",
            "bad": "There was cake on the bed, cake on the roof and no place to sit",
            "want": "one small piece",
        },
        {
            "say": "I wish it were never night",
            "got": "The sun stood still in the sky",
            "bad": "Nobody could sleep, and the flowers began to droop",
            "want": "the moon and the stars",
        },
        {
            "say": "I wish I were as tall as a tree",
            "got": "{He} grew and grew and grew",
            "bad": "{He} could not fit into the house or hug anyone",
            "want": "to be small again",
        },
        {
            "say": "I wish everything were made of gold",
            "got": "The grass turned to gold, and so did the bread",
            "bad": "The bread was too hard to eat and the bed was too hard to sleep in",
            "want": "soft, warm bread",
        },
        {
            "say": "I wish my toys could talk",
            "got": "All the toys began to talk at once",
            "bad": "They talked all day and all night, and {he} could not hear {g}",
            "want": "a little quiet",
        },
        {
            "say": "I wish it would snow every day",
            "got": "Big flakes began to fall, and they did not stop",
            "bad": "The snow covered the door, and it was cold for {while}",
            "want": "one warm day of sun",
        },
        {
            "say": "I wish I could fly",
            "got": "{His} feet left the ground",
            "bad": "{He} went higher and higher and did not know how to come down",
            "want": "to stand on the ground again",
        },
    ),
    "magic": (
        {"new": "a small golden stone", "it": "stone"},
        {"new": "an old lamp", "it": "lamp"},
        {"new": "a strange silver bell", "it": "bell"},
        {"new": "a blue bottle", "it": "bottle"},
        {"new": "a glowing feather", "it": "feather"},
        {"new": "a hat with stars on it", "it": "hat"},
        {"new": "a tiny wooden key", "it": "key"},
    ),
    "bake": (
        {"a": "a chocolate cake", "it": "cake", "need": "eggs", "wrong": "salt", "right": "sugar"},
        {"a": "an apple pie", "it": "pie", "need": "flour", "wrong": "pepper", "right": "cinnamon"},
        {"a": "a big loaf of bread", "it": "loaf", "need": "milk", "wrong": "sand", "right": "flour"},
        {"a": "a pot of soup", "it": "soup", "need": "carrots", "wrong": "sugar", "right": "salt"},
        {"a": "a berry tart", "it": "tart", "need": "butter", "wrong": "salt", "right": "sugar"},
    ),
    "hurt": (
        {"who": "a lion", "it": "lion", "pain": "a thorn in my paw", "do": "pulled the thorn out gently"},
        {
            "who": "a big bear",
            "it": "bear",
            "pain": "a bad tooth",
            "do": "tied a string to the tooth and gave one quick pull",
        },
        {
            "who": "a gray wolf",
            "it": "wolf",
            "pain": "a stone stuck in my foot",
            "do": "took the stone out and washed the foot",
        },
        {"who": "an old goat", "it": "goat", "pain": "a rope around my leg", "do": "untied the rope very slowly"},
        {
            "who": "a grumpy dog",
            "it": "dog",
            "pain": "a fly in my ear",
            "do": "blew into the ear until the fly came out",
        },
        {
            "who": "a huge dragon",
            "it": "dragon",
            "pain": "a fish bone between my teeth",
            "do": "reached in and took the bone out",
        },
    ),
    "race": (
        {"the": "the running race", "by": "running up the hill every morning", "trip": "tripped over a root"},
        {"the": "the boat race", "by": "rowing across the pond every evening", "trip": "hit a rock"},
        {"the": "the sack race", "by": "hopping around the yard in an old sack", "trip": "fell flat on the grass"},
        {"the": "the sled race", "by": "pulling the sled up and racing down again", "trip": "slid into a pile of snow"},
        {"the": "the swimming race", "by": "swimming to the rock and back each day", "trip": "got a cramp in one leg"},
    ),
}

# Banks that come with a record.
OWNER = {"spot": "place"}

# --- What happens -----------------------------------------------------------------------------------

OPENING = (
    (
        "[Once upon a time|Once], there [was|lived] a {trait} {species} named {h}.",
        "There once was a {trait} {species} [named|called] {h}.",
        "{h} was a {trait} {species} who lived {home}.",
        "In {land}, there lived a {trait} {species} [named|called] {h}.",
        "[Once upon a time|Long ago], in {land}, there was a {trait} {species} named {h}.",
        "[Once upon a time, a|A] {trait} {species} named {h} lived {home}.",
        "This is the story of {h}, a {trait} {species}[| who lived {home}].",
        "{Home}, there lived a {trait} {species}. {His} name was {h}.",
    ),
    (
        "?",
        "{He} [loved|liked] to {hobby}[| and {hobby2}].",
        "More than anything, {h} [loved|liked] to {hobby}.",
        "Every day, {he} liked to {hobby}[| and {hobby2}].",
        "{He} was always ready to {hobby}.",
        "{H} and {his} friends liked to {hobby}.",
        "On some days {he} would {hobby}, and on others {he} would {hobby2}.",
        "What {he} liked best was to {hobby}[| and to {hobby2}].",
        "[All|The whole] year long, {h} liked to {hobby}.",
        "Everyone knew that {h} loved to {hobby}.",
        "[If you asked {him}|When someone asked {him}], {h} would say that the best thing in the world was to {hobby}.",
    ),
    (
        "?",
        "{He} had [big|round|bright|brown|shiny] eyes and a [loud|soft|warm|funny] laugh.",
        "{His} favorite food was {treats}[|, and {his} favorite color was {color}].",
        "Everyone [in the village|who knew {him}|around] liked {him}.",
        "{He} [always wore|never went out without] a {color} [hat|scarf|ribbon|coat].",
        "{He} was not very [big|tall|strong], but {he} had a [big|good|warm] heart.",
        "{He} lived with {his} [family|brothers and sisters|big family], and {he} was the [youngest|smallest|loudest|quietest] of them all.",
        "{He} always had a [stone|string|feather|shell|button] in {his} pocket.",
        "{His} [room|bed|little corner] was full of [books|pictures|shells|toys].",
    ),
)

ENDING = (
    (
        "?",
        "[At home|Later], {h} [ate|had] {treats} [and drank warm milk|with honey|by the fire].",
        "[When the stars came out|In the evening], {h} [sat by the window|lay in the grass] and [hummed a little song|counted the stars|thought of it all].",
        "On the way home, {h} [sang|whistled|skipped|hopped|hummed] [happily|the whole time].",
        "{h} [told|would tell] [everyone|all {his} friends] about it [for many days|the next day].",
        "The next [day|morning], {h} [drew a picture of it|made up a song about it|woke up with a smile].",
    ),
    (
        "?",
        "That night, {h} [slept very well|fell asleep with a smile|dreamed of {dream}].",
        "It was [a very good day|a day to remember][| for {h}].",
        "{h} {joy2}.",
        "{h} never forgot that day.",
        "When {h} [lay|was] in bed that night, {he} dreamed of {dream}.",
        "And {h} was [very|so] happy.",
        "And every time {he} thought of it, {h} smiled.",
        "The sun went down, and everyone was happy.",
        "The end.",
    ),
)

_OUT = (
    "?",
    "{weather}",
    "{weather} {weather2}",
    "The sky was blue and {place_sight}.",
    "There was a lot to see: {place_sight}.",
)

# A plot is the kinds of hero that it suits, one of which is drawn, and its beats; "\n\n" is where a paragraph can end.
_ANY, _CHILD = ("child", "child", "animal"), ("child",)

PLOTS = (
    # A toy is lost and found.
    (
        _ANY,
        (
            (
                "{h} had a {look} {toy} that {he} [took everywhere|loved very much|never left at home].",
                "{His} favorite thing was a {look} {toy}[|, a present from {g}].",
                "For {his} birthday, {h} got a {look} {toy}. {He} [played with it every day|did not want to put it down].",
            ),
            ("{day}, {h} took the {toy} {place_to}.", "{day}, {h} went {place_to} with the {toy}."),
            _OUT,
            (
                "{h} played until {he} was tired. When it was time to go home, the {toy} was gone!",
                "{He} ran and jumped and forgot all about the time. Then {he} looked down. The {toy} was not there!",
                "After lunch, {h} wanted to play with the {toy}, but {he} could not find it.",
            ),
            "\n\n",
            (
                '"{oh}! Where is my {toy}?" [cried|said|asked] {h}. {sadness}',
                '{sadness} "I [have|want] to find my {toy}," [said {h}|{he} said].',
            ),
            (
                "First, {he} looked {spot}. There was only {junk}. Then {he} looked {spot2}. [Nothing|It was not there either].",
                "{He} looked {spot} and found {junk}. {He} looked {spot2} and found {junk2}. But there was no {toy}.",
                "{He} searched {spot}, but all {he} saw was {junk}.",
            ),
            (
                '{F_full} [came by|walked over|heard {him}] and asked, "[What is wrong|Why are you so sad]?" "I lost my {toy}," said {h}. "[I will help you|Let us look together|Do not worry. Two can look better than one]," said {f}.',
                'Then {f_full} came {place_to}. "[Can I help you|Did you lose something]?" {f_he} asked. "Yes," said {h}. "My {toy} is gone."',
            ),
            "\n\n",
            (
                '[They looked and looked.|They looked everywhere together.] [At last|Then|Suddenly], {f} called, "[Here it is|I see it|Look over here]!" The {toy} was {spot3}[|, next to {junk3}].',
                '{f} [thought for a moment|had an idea]. "Where did you [sit down|stop] to rest?" {h} [remembered|thought hard]. {He} ran to look {spot3}, and there was the {toy}!',
            ),
            (
                '{h} [hugged|held] the {toy} and {joy}. "Thank you, {f}! You are {goodfriend}."',
                '"Thank you!" said {h}. {He} {joy}. [Then they played with the {toy} together.|]',
            ),
            (
                "?",
                "From that day on, {h} always [kept the {toy} close|knew where {his} {toy} was|put {his} things in a safe place].",
                "{h} learned that it is [good|easier] to ask a friend for help.",
                "Now {h} looks after {his} things and helps others look for theirs.",
            ),
        ),
    ),
    # Something is stuck up high.
    (
        _ANY,
        (
            (
                "{h} had a {look} {high_thing}. {He} liked to {high_do}.",
                'For {his} birthday, {g} gave {h} a {look} {high_thing}. "[Thank you|I love it]!" said {h}. {He} wanted to {high_do}.',
            ),
            ("{day}, {h} and {f_full} were {place_in}.", "{day}, {h} met {f_full} {place_in}."),
            _OUT,
            (
                "{high_got}, and [soon|then] the {high_thing} was stuck {high_where}!",
                '{high_got}. "{oh}!" [cried|shouted] {h}. The {high_thing} was stuck {high_where}.',
            ),
            "\n\n",
            (
                "?",
                "{h} jumped [as high as {he} could|up and down], but {he} could not reach it. {f} threw a [stick|stone|pine cone], but it [did not help|missed].",
                "First {h} tried to climb, but [{his} hands slipped|it was too high]. Then {f} [shook|kicked] the {high_top}. Nothing [happened|moved].",
                '{h} stood on the back of {f}. "[Higher|A little more]!" {he} called. But they [fell over|were too small], and both of them landed in the grass.',
            ),
            (
                "?",
                '{sadness} "[I will never get it back|It is gone for ever]," {he} said.',
                '"[We need to think|Do not give up]," said {f}. "There must be a way."',
            ),
            (
                "[Just then|Soon], {g} came with {tool_name}. {G_he} {tool_use}.",
                "{f} ran to get {g}. {G} brought {tool_name}, {tool_use}.",
                '"[I have an idea|I know what we need]!" said {f}. {f_He} ran off and came back with {tool_name}. Then {f_he} {tool_use}.',
            ),
            (
                "Down came the {high_thing}, right into {his} arms! {h} {joy}.",
                'The {high_thing} [came loose|moved a little, and then a little more] and fell [softly|down] into the grass. "{hooray}!" they shouted.',
            ),
            "\n\n",
            (
                "?",
                '"Thank you for your help," said {h}. "[I could not have done it alone|I am lucky to have you]."',
                "{h} shared the {high_thing} with {f}, and they took turns all day.",
                "After that, {h} [held on tight|was more careful] when the wind was strong.",
            ),
        ),
    ),
    # Two want the same thing.
    (
        _ANY,
        (
            (
                "{day}, {h} and {f_full} found a {look} {toy} {place_in}.",
                "{day}, there was a {look} {toy} lying {spot}. {h} and {f_full} saw it at the same time.",
                "{day}, {g} brought home a {look} {toy}. {h} wanted it, and so did {f_full}.",
            ),
            (
                '"[It is mine|I saw it first|I want it]!" said {h}. "No, [it is mine|I want it|I was first]!" said {f}.',
                '"Give it to me!" [shouted|cried] {h}. "[No|Never]!" [shouted|cried] {f}.',
            ),
            (
                "?",
                "[They pulled and pulled.|{h} pulled on one side and {f} on the other.] [Crack! The|Then there was a snap, and the] {toy} broke in two.",
                "They [pushed|pulled] so hard that they both fell [in the mud|down], and the {toy} rolled away and [broke|fell into a hole].",
                "They were so [angry|loud] that nobody played with the {toy} at all. It just lay there on the ground.",
            ),
            "\n\n",
            (
                "?",
                "{h} looked at {f}. {f} looked at {h}. They both felt [bad|sorry|silly].",
                "Now [nobody was happy|both of them were sad|it was very quiet].",
            ),
            (
                '{G} [saw it all|heard the noise and came over]. "[A {toy} is more fun with two|You can take turns|When you fight, nobody gets to play]," {g_he} said.',
                '{G} sat down with them. "What is better," {g_he} asked, "a {toy} and no friend, or a {toy} and a friend?"',
            ),
            (
                '"I am sorry," said {h}. "[I am sorry, too|Me, too]," said {f}. "[Let us fix it together|You can go first]."',
                '{h} thought about it. "You can [have it first|be the first]," {he} said to {f}. "Then it is my turn."',
            ),
            "\n\n",
            (
                "They [mended|cleaned] the {toy} with {g} and took turns [all day|until the sun went down].",
                "[Soon|After that], they were [laughing|playing] together, and the {toy} was [twice the fun|more fun than before].",
                "They made up a new game with the {toy} that needed two [players|friends].",
            ),
            (
                "?",
                "{h} and {f} learned that sharing is [fun|better than fighting].",
                "From then on, they shared [everything|all their toys].",
            ),
        ),
    ),
    # A fear is overcome.
    (
        _ANY,
        (
            (
                "But {h} was [afraid|scared] of {fear_of}. {fear_sign}.",
                "There was only one thing {h} did not like: {he} was afraid of {fear_of}. {fear_sign}.",
            ),
            (
                "?",
                'The others [laughed|did not understand]. "Do not be a baby," they said.',
                "{He} did not tell anyone about it.",
            ),
            ("But {later}, {fear_test}.", "And then, {later}, {fear_test}."),
            (
                "?",
                '{His} [knees shook|heart went thump, thump, thump|hands were cold]. "I [cannot do|do not like] this," {he} [whispered|said].',
                "{h} [froze|wanted to run away]. {He} [shut {his} eyes|could hardly breathe].",
            ),
            "\n\n",
            (
                '{G} [took {his} hand|sat down next to {him}]. "[You know|Listen]," {g_he} said, "I was afraid of {fear_of} once, too. {fear_truth}."',
                '{F_full} stood beside {him}. "I will stay with you," said {f}. "{fear_truth}."',
            ),
            ("?", "{h} nodded slowly.", '"I will try," said {h}.', '"Really?" asked {h}. "Really."'),
            ("{He} {fear_step}.", "So {h} {fear_step}.", "{h} was still scared, but {he} {fear_step}."),
            "\n\n",
            (
                '[And then|Soon|To {his} surprise], {fear_after}. "{hooray}!" {he} [called|shouted|laughed].',
                "Little by little, it got easier. [Soon|In the end], {fear_after}.",
            ),
            (
                "?",
                '{h} was so proud. "I was scared, and I did it [anyway|all the same]!" {he} said.',
                '"[I knew you could do it|You are very brave]!" said {g}.',
            ),
            (
                "Now {h} is not afraid of {fear_of} [any more|at all].",
                "{h} learned that being brave does not mean not being afraid.",
                'Later, when a little friend was afraid of {fear_of}, {h} said, "[Take my hand|I know how you feel]. {fear_truth}."',
            ),
        ),
    ),
    # Something is broken, and the truth is told.
    (
        _ANY,
        (
            (
                '"[Please be careful|No games inside], {h}," said {g} [every day|that morning]. But {h} [forgot|did not listen].',
                "{G} had a [beautiful|pretty|very old] {broken_thing}. {G_he} liked it [a lot|very much].",
            ),
            (
                "{day}, {h} was {broken_by}. {broken_sound}! The {broken_thing} broke into [many|a hundred] pieces.",
                "{day}, {h} was {broken_by} when {he} [heard a noise|bumped into something]. {broken_sound}! It was the {broken_thing}.",
            ),
            (
                "?",
                '"{oh}," {he} [whispered|said]. "{G_name} will be [angry|so sad]."',
                "{h} looked at the pieces. {His} face [turned red|became hot].",
            ),
            "\n\n",
            (
                "{He} [hid|pushed] the pieces under the [bed|rug|table] and [ran outside|said nothing]. But {his} tummy felt [funny|bad], and {he} could not play.",
                '"I could say that the [wind|cat] did it," {he} thought. But that was not true, and it made {him} feel [bad|worse].',
            ),
            (
                'When {g} came [home|in], {g_he} asked, "[Where is|What happened to] the {broken_thing}?"',
                'At dinner, {h} could not eat. "What is wrong?" asked {g}.',
            ),
            (
                '{h} took a deep breath. "I broke [it|the {broken_thing}]," {he} said. "I was {broken_by}. I am [so|very] sorry."',
                '{h} began to cry. "It was me," {he} said. "I broke the {broken_thing}. I am sorry."',
            ),
            "\n\n",
            (
                '{G} was [quiet for a moment|a little sad]. Then {g_he} [hugged {him}|smiled]. "Thank you for telling me the truth," {g_he} said. "[That was brave|A thing can be mended, but trust is harder to mend]."',
                '"I am sad about the {broken_thing}," said {g}, "but I am glad that you told me the truth."',
            ),
            (
                "Together they [swept the floor|picked up the pieces|picked up the pieces and glued them together, which took {while}].",
                "{h} helped {g} clean up. The next day, {he} used {his} own coins to buy a new {broken_thing}.",
            ),
            (
                "?",
                "{h} felt [light|much better] again.",
                "{h} learned that it is best to tell the truth, even when it is hard.",
                "After that, {h} [was very careful in the house|played wild games only in the yard].",
            ),
        ),
    ),
    # A small lost animal is brought home.
    (
        _CHILD,
        (
            (
                "{day}, {h} was {place_in} when {he} heard a [small|tiny|sad] sound.",
                "{day}, on the way {place_to}, {h} heard something cry.",
            ),
            (
                "{He} looked {spot}. There sat a {animalbaby}, all alone.",
                "It came from a place {spot}. It was a {animalbaby}, [cold and wet|shaking with fear]!",
            ),
            (
                '"[Hello, little one|Do not be afraid]," said {h}. "[Where is your mother|Are you lost]?" The {animalbaby} [only looked at {him}|made a sad sound].',
                '"You poor thing!" said {h}. "I will help you find your mother."',
            ),
            "\n\n",
            (
                "?",
                "{h} gave it [some water|a bit of bread|a warm place in {his} hat].",
                "{He} wrapped the {animalbaby} in {his} [coat|scarf] to keep it warm.",
            ),
            (
                "?",
                "They looked {spot2}, but the mother was not there. They found only {junk}.",
                '{h} asked a [farmer|fisherman|mailman], "Have you seen its mother?" But [he|the man] shook his head.',
            ),
            (
                "{h} did not give up. {He} [sat very still and listened|carried it a little farther].",
                '"[Let us wait here and be quiet|I have an idea. Call for her]!" said {h}.',
            ),
            "\n\n",
            (
                "[At last|Then], there was a call from somewhere {spot3}. The {animalbaby} called back! Its mother [came running|was there].",
                "Suddenly, the {animalbaby} lifted its head. There, {spot3}, was its mother! She had been looking for it [all day|everywhere].",
            ),
            (
                "{h} set the {animalbaby} down, and it [ran|hurried] to its mother. {h} {joy}.",
                "The mother [rubbed her nose on|put her nose to] {h}'s hand, as if to say thank you. {h} {joy}.",
            ),
            (
                "?",
                "The next day, {h} came back, and the two were there to [say hello|greet {him}].",
                '"Goodbye, little friend," said {h}. {He} waved until they were out of sight.',
                '{h} told {g} about it. "You did a good thing," {g_he} said.',
            ),
        ),
    ),
    # A present that no money buys.
    (
        _ANY,
        (
            (
                "It was [almost|nearly] the birthday of {f_full}, and {h} wanted to give {f_him} [something special|the best present].",
                '{day}, {h} heard that it was the birthday of {f_full}. "I need a present!" {he} said.',
            ),
            (
                "But {h} had no [money|coins]. {sadness}",
                "{He} looked in {his} [box|pocket], but there was only {junk}.",
                "In the shop, there was a {look} {toy}, but it cost too much.",
            ),
            "\n\n",
            (
                '"[You do not need money|The best presents are not from a shop]," said {g}. "[Make something with your own hands|Give something that comes from your heart]."',
                '{h} thought [hard|for a long time]. Then {he} had an idea. "I can make something!"',
            ),
            (
                "{He} {gift_make} and [began to work|went to work]. Then {he} {gift_part}.",
                "So {he} {gift_make}. It was [hard|a lot of work], but {h} did not stop. {He} {gift_part}.",
            ),
            (
                "?",
                "The first try was not [so|very] good, so {he} [started|began] again.",
                '[Now and then|Twice], {g} came to look and [nodded|said, "How lovely!"]',
            ),
            ("In the end, it was ready: {gift_new}.", "When the sun went down, {he} had made {gift_new}."),
            "\n\n",
            (
                'At the party, the others gave {f} [big boxes|toys and sweets]. {h} was [shy|a little worried]. "This is [only|just] a small thing," {he} said.',
                '{h} [ran|walked] to {f}\'s house. "Happy birthday!" {he} said. "I made this for you."',
            ),
            (
                '{f} {fjoy}. "This {gift_it} is beautiful! Did you make it yourself?" {f_he} asked. "[This|It] is the best present of all!"',
                '{f} did not say a word. Then {f_he} hugged {h}. "I will [keep|remember] this {gift_it} for ever," {f_he} said.',
            ),
            (
                "?",
                "Then they ate {treats} [and danced|and played games] until it was [dark|time to go].",
                "{h} learned that a present made with love is worth more than gold.",
            ),
        ),
    ),
    # A seed takes its time.
    (
        _ANY,
        (
            (
                '{day}, {g} gave {h} a [tiny|small|little] {seed} seed. "[Plant it|Put it in the ground] and [wait|take care of it]," {g_he} said.',
                '{day}, {h} found a {seed} seed [on the path|in {his} pocket]. "What will it be?" {he} [asked|wondered].',
            ),
            (
                "{h} dug a hole [in the garden|behind the house|near the fence], put the seed in and gave it some water.",
                '{h} put it in the [soft|dark] earth and covered it up. ["Grow!" {he} said.|]',
            ),
            (
                "The next morning, {he} ran out to look. There was [nothing|only brown earth]. The day after that, there was still nothing.",
                "{h} sat beside it and waited. {He} waited for {while}. Nothing [happened|came up].",
            ),
            "\n\n",
            (
                '"[Is it broken|Does it not like me|Why does it not grow]?" [asked|said] {h}. {sadness}',
                '"I do not want to wait any more!" said {h}. {He} wanted to dig it up [to look|again].',
            ),
            (
                '"[Good things take time|It is working where you cannot see it|Seeds are slow, but they do not forget]," said {g}.',
                '{F_full} came to look. "[My plant took many days|Be patient]," said {f}. "[Give it water and sun|Sing to it]. Then you will see."',
            ),
            (
                "So {h} gave it water every [day|morning] and [pulled out the weeds|told it stories|kept the birds away].",
                "{h} made a little [fence|sign] for it. When it was dry, {he} brought water. When it was windy, {he} [stood in front of it|kept it safe].",
            ),
            "\n\n",
            (
                'Then, after {while2}, {he} saw a small green [leaf|tip]! "{hooray}! It is growing!" {he} shouted.',
                "One [rainy|sunny] morning, something green looked out of the ground. {h} {joy}.",
            ),
            (
                "It grew [and grew|taller every day], and by the end of summer [it was taller than {h}|everyone came to see it].",
                "By the end of summer, there was [enough for everyone|a big harvest]. {h} shared it with {f} and {g}.",
            ),
            (
                "?",
                "{h} learned to [wait|be patient].",
                "{He} kept one seed for the next [year|spring].",
                '"You were right," {h} told {g}. "Good things take time."',
            ),
        ),
    ),
    # Cooking goes wrong, then right.
    (
        _ANY,
        (
            (
                "{day}, {h} wanted to make {bake_a} for {g}.",
                "{day}, {h} and {f_full} wanted to make {bake_a} [for the party|for dinner].",
            ),
            (
                "{h} put on a [white|big] hat and washed {his} hands. Then {he} got [a bowl|a big spoon].",
                "{h} [took|got] a big bowl and a [wooden|long] spoon and began to mix.",
            ),
            (
                "{h} was in a hurry and did not read the [label|words on the jar]. {He} put in {bake_wrong} instead of {bake_right}!",
                "But the jars looked the same. {h} took the {bake_wrong} and thought that it was {bake_right}.",
            ),
            "\n\n",
            (
                'The {bake_it} smelled [strange|funny]. {h} took a bite. "[Yuck|Ew|Oh no]!" {he} cried. "This is [terrible|awful]!"',
                'When it was ready, {f_full} tasted it first. {f_His} face [turned green|went all crooked]. "{bake_Wrong}!" {f_he} said.',
            ),
            (
                '{sadness} "[All that work for nothing|Now there is no {bake_it}]," {he} said.',
                "{h} looked at the {bake_it}. Then {he} [began to laugh|sighed].",
            ),
            (
                '{G} came in and [saw the mess|smelled it]. "[Everyone makes mistakes|I once did the same thing]," {g_he} said. "[Shall we try again, slowly?|Let us do it again, slowly.]"',
                '"We can [start over|make a new one]," said {g}. "This time we will taste first."',
            ),
            "\n\n",
            (
                "[They|So they] started over. {h} stirred and {g} [read the words aloud|held the bowl]. This time, {he} tasted the {bake_right} first.",
                "They worked [slowly|side by side]. {h} smelled every jar before {he} used it.",
            ),
            (
                "[Soon|After an hour], the kitchen smelled wonderful. The new {bake_it} was [just right|the best in the land].",
                "When it came out of the [oven|kitchen], the {bake_it} was [perfect|warm and good]. Everybody [had two plates|wanted more].",
            ),
            (
                "?",
                "{h} learned that going slowly is sometimes the fastest way.",
                '"[Mistakes help us learn|It tastes even better the second time]," said {h} with a full mouth.',
                "{h} put a [red|big] sign on the {bake_wrong} jar, just to be safe.",
            ),
        ),
    ),
    # Rain spoils a plan.
    (
        _ANY,
        (
            (
                "{day}, {h} and {f_full} wanted to have a picnic {place_in}. They packed {treats} and {treats2}.",
                "{h} had looked forward to the trip {place_to} for {while}. {He} packed a bag with {treats} and a {look} {toy}.",
            ),
            (
                "But when they [opened the door|got there], big drops began to fall. [Drip, drop|Splash, splash]!",
                "Then the sky became [gray|dark], and it began to rain.",
            ),
            (
                "?",
                '"{oh}! [Our day is ruined|Now we cannot go]," said {h}. {sadness}',
                '{h} pressed {his} nose to the window. "Rain, rain, go away," {he} said. But the rain [stayed|did not listen].',
            ),
            "\n\n",
            (
                '{F_full} looked at the {look2} [blanket|rug] on the floor. "[I have an idea|What if the picnic comes inside]!" {f_he} said.',
                '"Who says that a picnic has to be outside?" asked {g}.',
            ),
            (
                "They put a blanket over [two chairs|the table] and made a tent. They laid out the {treats} [on a big plate|in a circle].",
                "They [drew|painted] a sun and put it on the wall. Then they sat on the floor and ate {treats}.",
            ),
            (
                "?",
                "They told stories about {tale}. The rain [played|drummed] on the roof like music.",
                "{h} pretended to be a [bear|pirate|captain], and {f} pretended to be a [lost sailor|brave king|talking fish].",
            ),
            "\n\n",
            (
                "[Then|After a while], the rain stopped, and there was a [rainbow|big rainbow over the roofs]. But they did not want to go out! They were having too much fun.",
                "When the rain stopped, they ran out and jumped in [every puddle|all the puddles] {place_in}.",
            ),
            (
                '"[I like rain now|That was the best picnic ever]," said {h}.',
                "{h} learned that a bad day can turn into a good one.",
                '"I hope it rains [again|next time], too," said {f}, and they both laughed.',
            ),
        ),
    ),
    # A race is lost and something better is won.
    (
        _ANY,
        (
            (
                "{h} [wanted|hoped] to win {race_the}. {He} got ready by {race_by}.",
                "Every year there was a race, and this year {h} wanted to win {race_the}. {He} practiced by {race_by}.",
            ),
            (
                '{F_full} was the [fastest|strongest] of all. "[Nobody can beat me|You are too slow]!" {f_he} [laughed|said].',
                "The one to beat was {f_full}, who had won the year before.",
            ),
            (
                '{day}, it was time. "Ready, set, go!" called {g}.',
                "On the big day, everyone came to watch. {G} [waved a flag|blew a whistle], and off they went.",
            ),
            (
                "{h} went as fast as {he} could. Soon only {f} was in front of {him}.",
                "At first, {h} was last. Then {he} passed one, and another, until only {f} was left.",
            ),
            "\n\n",
            ('Then {f} {race_trip}. "[Ouch|Help]!" cried {f}.', "Near the end, {f} {race_trip} and could not go on."),
            (
                "{h} could [win now|see the finish line]. {He} looked [ahead|at the line], and {he} looked back at {f}. Then {he} stopped.",
                "{h} did not think about it for long. {He} turned around.",
            ),
            (
                '"[Are you hurt|Are you all right]?" asked {h}. {He} helped {f} up, and they went on side by side[| while the others passed them].',
                '"Come, [lean on me|take my hand]," said {h}. Slowly, they went on together.',
            ),
            "\n\n",
            (
                "They came in last. But everyone [cheered|clapped] louder for them than for the winner.",
                '{h} did not win the [gold cup|prize]. But {f} took off {f_his} {look} [hat|ribbon] and gave it to {him}. "You are the real winner," {f_he} said.',
            ),
            (
                '"Why did you stop?" asked {f}. "[Because a friend is worth more than a prize|You needed help]," said {h}.',
                "After that day, {h} and {f} [were best friends|practiced together].",
            ),
        ),
    ),
    # Someone new is shy.
    (
        _ANY,
        (
            (
                "{day}, someone new came to [the village|live next door]. It was {f_intro}.",
                "{day}, {h} saw {f_intro} sitting all alone {spot}.",
            ),
            (
                "{f} did not [talk|say hello] to anyone. {f_He} just looked at {f_his} [feet|shoes].",
                "Nobody played with {f_him}. {f} was very shy.",
            ),
            (
                "?",
                'The others said, "{f} is [strange|no fun]." But {h} did not think so.',
                "{h} remembered how it felt to be new.",
            ),
            "\n\n",
            (
                '{h} walked over. "Hello, I am {h}. Do you want to {hobby}?" {he} asked. {f} [shook {f_his} head|said nothing].',
                '{h} smiled at {f_him}. "I like your [hat|smile]," {he} said. {f} looked [up|away].',
            ),
            (
                "So {h} [sat down beside {f_him}|stayed], and they [watched the clouds|looked at the ants] without a word. Then {h} broke {his} {treat} in two and gave {f} the bigger half.",
                "The next day, {h} brought a {look} {toy}. {He} [put it down between them|rolled it over to {f}]. {f} [smiled a little|pushed it back].",
            ),
            (
                '"[Thank you|You are nice]," {f} said [softly|in a very small voice]. "[At home|Where I come from], I liked to {hobby3}, but I do not know anyone here." {h} took {f_his} hand.',
                '"I can {skill_to}," said {f} [softly|at last]. "Really? Can you show me?" asked {h}.',
            ),
            "\n\n",
            (
                '"Then come with me!" said {h}. [Soon|Before long], they were [laughing and running|playing] {place_in}.',
                '"[I want to try that, too|Let us do it together]!" said {h}. And {f} laughed for the first time.',
            ),
            (
                "?",
                'The others saw how much fun they had. "Can we play, too?" they asked. "{yes}!" said {f}.',
                "After that, {f} was not alone any more.",
            ),
            (
                "?",
                "{h} learned that [a kind word can open a door|it only takes a small hello to make a friend].",
                "From then on, {h} and {f} met every day.",
            ),
        ),
    ),
    # What is built falls down and is built again.
    (
        _ANY,
        (
            (
                "{day}, {h} wanted to build {build_a} out of {build_of}.",
                '{day}, {h} had a big plan. "I will build {build_a}!" {he} told {f_full}.',
            ),
            (
                '"[Can I help|Do you need help]?" asked {f_full}. "No, I can do it alone," said {h}.',
                "{He} worked for {while} and did not [stop to eat|let anyone help].",
            ),
            (
                "?",
                "It got bigger and bigger. {h} put a {look} [flag|ribbon] on it.",
                '"It will be the best {build_it} [ever|in the world]," {he} said.',
            ),
            ("But then {build_ruin}.", "[Just as|When] it was almost done, {build_ruin}."),
            "\n\n",
            (
                "?",
                '"My {build_it}!" [cried|shouted] {h}. {sadness}',
                '{h} was so [angry|upset] that {he} kicked what was left. "I will never build anything again!" {he} said.',
            ),
            (
                '{F_full} came and sat next to {him}. "[It was a good {build_it}|I am sorry about your {build_it}]," said {f}. "[Maybe we can make a better one|What if we build it {build_fix}]?"',
                '"What did you learn from it?" asked {g}. {h} [thought|wiped {his} eyes]. "Maybe it should be built {build_fix}," {he} said.',
            ),
            (
                '{h} [wiped {his} face|took a deep breath]. "{yes}," {he} said. "[Will you help me?|Let us do it together.]"',
            ),
            "\n\n",
            (
                "So they tried again, {build_fix}. {h} [carried|brought] the {build_of}, and {f} [held everything in place|put it all together].",
                "This time they worked together and built it {build_fix}. [It took {while}.|]",
            ),
            (
                '[At last|In the evening], the new {build_it} [was done|was finished]. It was [better|stronger] than the first. "{hooray}!" they shouted.',
                "The {build_it} [held|did not fall]. {h} {joy}.",
            ),
            (
                "?",
                "{h} learned that it is all right to [fail|start again].",
                '"[It is better with two|We make a good team]," said {h}.',
            ),
        ),
    ),
    # A wish that is too big.
    (
        _ANY,
        (
            (
                "{day}, {h} found {magic_new} {spot}.",
                "{day}, {h} was {place_in} and saw something {spot}. It was {magic_new}.",
            ),
            (
                '{He} rubbed it, and a [tiny|soft|deep] voice said, "You have one wish."',
                'When {he} picked it up, the {magic_it} [began to glow|became warm]. "Make a wish," it [whispered|said].',
            ),
            (
                '"{wish_say}!" said {h} [at once|without thinking].',
                '{h} did not think for long. "{wish_say}!" {he} [cried|said].',
            ),
            ("[Poof|Zing|Whoosh]! {wish_got}. At first, {h} {joy}.", '{wish_got}. "{hooray}!" shouted {h}.'),
            "\n\n",
            (
                "But [soon|then] it was not so [nice|funny] any more. {wish_bad}.",
                "But the next day, something was wrong. {wish_bad}.",
            ),
            (
                '{sadness} "This is not what I wanted," {he} said. "All I want is {wish_want}."',
                '"[What have you done|Oh, {h}]!" said {g}. "I only wanted to be happy," said {h}. "But now all I want is {wish_want}."',
            ),
            "\n\n",
            (
                '{He} ran back to the {magic_it}. "Please take my wish back!" {he} [said|begged]. The {magic_it} [was quiet|waited] for a moment. Then everything was as before.',
                '{h} took the {magic_it} in both hands. "Please make it all as it was," {he} [said|whispered]. [Poof|Whoosh]! It was over.',
            ),
            (
                "{h} [put|laid] the {magic_it} back {spot} and went home to {g}.",
                "{h} threw the {magic_it} into the [river|sea], and nobody ever saw it again.",
                "{h} gave the {magic_it} to {g}, who put it on a high shelf.",
            ),
            (
                "After that, {h} liked things just the way they were.",
                "{h} learned to think before making a wish.",
                '"I have all I need," said {h}, and it was true.',
            ),
        ),
    ),
    # Something hard is learned.
    (
        _ANY,
        (
            (
                "{h} wanted to learn to {skill_to}. {F_full} could do it, and it looked so easy.",
                "All {his} friends could {skill_to}, but {h} could not.",
                '{day}, {h} saw {f_full} {skill_ing}. "I want to {skill_to}, too!" {he} said.',
            ),
            (
                "{He} tried [it at once|the very same day], but {he} {skill_fail}.",
                'The first time, {he} {skill_fail}. ["Ouch!" said {h}.|Everybody laughed.]',
            ),
            (
                "?",
                "{He} tried again. And again, {he} {skill_fail}.",
                "The second time was no better. The third time, {he} {skill_fail} [again|once more].",
            ),
            (
                '{sadness} "I [will never learn it|am no good at {skill_ing}]," {he} said.',
                '"I give up!" said {h} and [walked away|sat down in the grass].',
            ),
            "\n\n",
            (
                '"It took me {while}, too," said {g}. "{skill_how}. [And do not be angry when it goes wrong|Then try it again]."',
                '{G} [came over|had watched {him}]. "I will tell you a secret," {g_he} said. "{skill_how}."',
            ),
            (
                "{h} practiced every [day|morning|evening]. Some days were good and some days were [bad|not].",
                "So {h} did as {he} was told. [Slowly|Bit by bit], it got better.",
            ),
            (
                "?",
                "{He} had [a few bumps|tired arms], but {he} did not stop.",
                'When it was hard, {he} said to {himself}, "{skill_how}."',
            ),
            "\n\n",
            (
                'Then, {later}, it worked! "{hooray}! Look at me!" {he} shouted. "I can {skill_to}!"',
                "And {later}, all at once, {h} could do it. {He} {joy}.",
            ),
            (
                '"[I knew it|You did it]!" said {f}. [And they practiced together.|]',
                '{G} was so proud. "You did not give up," {g_he} said.',
            ),
            (
                "?",
                "{h} learned that you have to [fall|fail] a few times before you can {skill_to}.",
                'The next week, {h} showed a little [boy|girl|one] how to do it. "{skill_how}," {he} said.',
            ),
        ),
    ),
    # Too much of a good thing.
    (
        _ANY,
        (
            (
                '{day}, {g} made a big [plate|basket|bowl] of {treats}. "They are for [everyone|the party]," {g_he} said. "Please wait."',
                "{day}, {h} found a bush full of {fruit} {place_in}. There was enough for [everyone|all {his} friends].",
            ),
            (
                "But {h} could not wait. {He} took one, and then one more, and then [another|two more].",
                '"[Just one|Only a few]," said {h}. But one was not enough. {He} ate and ate until [nothing was left|they were all gone].',
            ),
            (
                "?",
                '{F_full} came by. "Can I have one?" {f_he} asked. "No, they are all mine," said {h}.',
                '"Save some for me," said {f_full}. But {h} did not [listen|stop].',
            ),
            "\n\n",
            (
                '[Soon|Then], {his} tummy began to [hurt|make strange sounds]. "Ow, ow!" said {h}.',
                "After a while, {h} felt [sick|very full]. {He} could not [run|stand up], and {his} tummy hurt.",
            ),
            (
                "When the others came, there was nothing left. They [were sad|looked at the empty plate]. {h} felt [bad|ashamed].",
                '"What is wrong?" asked {g}. {h} [looked at the floor|held {his} tummy]. "I ate too much," {he} said, "and I did not share."',
            ),
            "\n\n",
            (
                '{G} gave {him} some [tea|warm water] and [put {him} to bed|rubbed {his} tummy]. "Now you know," {g_he} said [softly|with a smile].',
                '{f} was not angry. {f_He} brought {him} a [cup of tea|warm blanket]. "Thank you," said {h}. "I should have shared with you."',
            ),
            (
                "The next day, {h} helped {g} make [new ones|some more], and this time {he} gave [one to everyone|the first one to {f}].",
                "When {h} was well again, {he} [looked for|got] some more and brought them all to {f}.",
            ),
            (
                "?",
                "They tasted [much|even] better when {he} shared them.",
                "{h} learned that too much of a good thing is not good.",
                '"[One for you and one for me|These are for you]," said {h}.',
            ),
        ),
    ),
    # A warning is not heeded.
    (
        _ANY,
        (
            (
                '"{danger_warn}," said {g}. "{danger_Why}." "Okay," said {h}.',
                '{day}, {h} went out to play. "{danger_warn}," {g} called after {him}, "because {danger_why}."',
            ),
            (
                'But {h} was [curious|bored]. "[Just once|Nothing will happen]," {he} thought.',
                '{h} forgot it [very soon|right away]. "[I am big enough|I only want to see]," {he} said.',
            ),
            (
                "?",
                "{He} looked around. Nobody was there. So {he} {danger_act}.",
                '{F_full} said, "[We should not do this|Stop, {h}]!" But {h} {danger_act}.',
            ),
            ("{danger_bad}!", '{danger_bad}. "{oh}!" cried {h}.'),
            "\n\n",
            (
                '"[Help|Help me]!" {he} called [as loud as {he} could|again and again].',
                "{He} called for help, but at first nobody [came|heard {him}]. {sadness}",
            ),
            (
                "[Luckily, {g} was not far away|Then {g} heard {him}|But {g} had sharp ears and came running]. {G_he} {danger_save}.",
                "{F_full} ran to get {g}. {G} {danger_save}.",
            ),
            "\n\n",
            (
                '{h} was [safe|shaking]. "I am sorry," {he} said. "I did not listen."',
                '"Thank you," said {h} [in a small voice|with tears in {his} eyes]. "I will listen next time."',
            ),
            (
                '"I am [just|so] glad that you are safe," said {g} and [hugged {him}|held {him} tight].',
                '{G} [was not angry|wrapped {him} in a blanket]. "Rules keep us safe," {g_he} said.',
            ),
            (
                "?",
                "From that day on, {h} listened [when {g} told {him} something|to {g}].",
                'Later, {h} told the little ones, "{danger_warn}, because {danger_why}." And they listened.',
            ),
        ),
    ),
    # A big, grumpy animal is in pain.
    (
        _ANY,
        (
            (
                "Near {his} home lived {hurt_who}. Everyone was afraid of the {hurt_it}, because he [growled|roared|grumbled] all day.",
                "{day}, {h} was {place_in} when {he} heard a [loud|terrible] [growl|roar|cry]. It was {hurt_who}.",
            ),
            (
                '"Run!" shouted {f_full}. [And everyone ran.|] But {h} [stopped|did not run]. {He} saw that the {hurt_it} was crying.',
                "{h} hid {spot} and looked. The {hurt_it} was not angry. He was sad.",
            ),
            "\n\n",
            (
                '"[What is wrong, {hurt_it}|Why are you so sad]?" asked {h} [softly|in a small voice]. "Go away," said the {hurt_it}. "I have {hurt_pain}, and nobody can help me."',
                '{h} came closer, one step at a time. "Does something hurt?" {he} asked. The {hurt_it} nodded. "I have {hurt_pain}," he said.',
            ),
            (
                "?",
                '"I can help you," said {h}, "[if you do not eat me|but you must hold still]."',
                '{h} was scared, but {he} did not like to see anyone in pain. "Hold still," {he} said.',
            ),
            ("{h} {hurt_do}.", 'Very carefully, {h} {hurt_do}. ["Ow!" said the {hurt_it}.|]'),
            "\n\n",
            (
                'The {hurt_it} [blinked|jumped up]. "It does not hurt any more!" he [said|roared]. "Thank you, little friend!"',
                '"[Oh|Ah]," said the {hurt_it}, "that is so much better. [Nobody was ever so kind to me|You are brave and kind]."',
            ),
            (
                "From then on, the {hurt_it} was not grumpy. He [gave everyone rides on his back|kept watch over the village|told funny stories every evening].",
                "Some days later, {h} got lost in the [fog|snow]. Who came to find {him}? The {hurt_it}! He carried {him} all the way home.",
            ),
            (
                "?",
                "{h} learned that someone who looks mean may only be hurt.",
                '"You see," {h} told {f}, "he only needed a friend."',
            ),
        ),
    ),
    # Hide-and-seek, too well.
    (
        _ANY,
        (
            (
                "{day}, {h} and {his} friends played hide-and-seek {place_in}. {F_full} [counted|had to count] to ten.",
                '{day}, {f_full} said, "Let us play hide-and-seek {place_in}! [I will count|You hide]."',
            ),
            (
                '"One, two, three..." {h} ran to hide. {Spot}? No, [that was too easy|someone was already there]. Then {he} saw [a good|the perfect] place {spot2}.',
                "{h} wanted to find the best place of all. {He} [crouched down|curled up] {spot2} and made {himself} very small.",
            ),
            (
                "It was [warm and quiet|soft and dark] there. {His} eyes became heavy, and {h} fell asleep.",
                "{He} waited for [a little while|a long time]. It was so quiet that {he} [closed {his} eyes|fell fast asleep].",
            ),
            "\n\n",
            (
                "?",
                "{f} found all the others, but not {h}. {f_He} looked {spot} and {spot3}. {f_He} found {junk}, but no {h}.",
                '"Come out, {h}! You win!" called {f}. But nobody answered. {f} began to worry.',
            ),
            (
                'They [told|called] {g}, and everyone looked for {him}. "{h}! Where are you?" they shouted.',
                "The sun was going down. {G} came with a [lamp|lantern] to help.",
            ),
            "\n\n",
            (
                "Then {f} heard a [funny|soft] sound. [Snore, snore|Zzz, zzz]! It came from somewhere {spot2}. There was {h}, sleeping like a baby.",
                '{h} woke up and heard the voices. "Here I am!" {he} called and came out with [leaves|grass] in {his} hair.',
            ),
            (
                '"[We looked for you everywhere|You gave us a scare]!" said {g} and hugged {him}. "[Did I win|Is the game over]?" asked {h}. Everybody laughed.',
                '"I am sorry," said {h}. "I did not want to scare you." "[You are the best at hiding|Next time, hide and stay awake]," said {f}.',
            ),
            (
                "?",
                "After that, they had a new rule: no sleeping in the game!",
                "They all walked home together and ate {treats}.",
            ),
        ),
    ),
    # A messy room.
    (
        _CHILD,
        (
            (
                "{h}'s room was [always a mess|full of toys]. There were books on the floor and {treats} under the bed.",
                '"{h}, please clean your room," said {g} every [day|morning]. "Later," said {h} every time.',
            ),
            (
                "{day}, {f} asked {him} to come {place_to} and to bring the {look} {toy}.",
                "{day}, {h} wanted to take {his} {look} {toy} {place_to}.",
            ),
            (
                "{He} looked under the bed, but there was only {junk}. {He} looked in the closet, and {junk2} fell on {his} head.",
                "But where was it? {He} looked [under the pillow|on the shelf] and found {junk}. {He} looked behind the door and found {junk2}.",
            ),
            (
                '"I cannot find it!" {he} [cried|said]. "{G_name}, have you seen my {toy}?"',
                '{sadness} "Someone took my {toy}," {he} said.',
            ),
            "\n\n",
            (
                '"[I think your room ate it|It must be under all that]," said {g} with a [smile|wink]. "[Clean up, and you will find it|Start with one corner]."',
                '{G} looked at the mess. "Things like to hide in a mess," {g_he} said. "Shall we do it together?"',
            ),
            (
                "So {h} put the books on the shelf, the socks in the drawer and the {toy2} in the box.",
                "{h} picked up one thing, then another. {He} even found {junk3}, which made {him} laugh.",
            ),
            "\n\n",
            (
                "And there, [under the last shirt|behind the big chair|at the bottom of the pile], was the {toy}! {h} {joy}.",
                "When the floor was clean, something {look} looked out from [behind the curtain|under the rug]. It was the {toy}!",
            ),
            (
                '"Now I can find [all|everything]," said {h}. [Then {he} ran to meet {f}.|]',
                "{h} looked around. The room was so big now! There was even space to dance.",
            ),
            ("?", "After that, {h} cleaned up every [evening|Sunday].", "From then on, each thing had its own place."),
        ),
    ),
    # The moon cannot be caught.
    (
        _ANY,
        (
            (
                '{h} loved the moon. It was so round and bright. "I want to [have|hold] it," {he} said.',
                'One night, {h} looked out of the window and saw the [big|full|yellow] moon. "I want to catch it!" {he} said.',
            ),
            (
                "?",
                "{He} climbed [a tall tree|to the top of the hill], but the moon was [still too high|no closer].",
                "{He} threw a rope at the moon, but it fell [down|on {his} own head].",
                "{He} jumped [from the roof of the shed|on {his} bed], but the moon was too far away.",
            ),
            (
                "Then {he} [took|got] a long [net|stick] and waved it at the sky. It was no use.",
                "Then {he} ran after it, but the moon ran, too. When {he} stopped, it stopped.",
            ),
            "\n\n",
            (
                "{h} sat down by the [lake|pond]. {sadness} [And there|Then {he} looked down, and there], in the water, was the moon!",
                'At the [lake|pond], {h} saw the moon in the water. "There you are!" {he} said. {He} reached for it, but it broke into a thousand bits of light.',
            ),
            (
                '"The moon is [not for one alone|for everyone to share]," said {g}, who had come after {him}. "[But it comes back to see you|You do not need to hold it to love it]."',
                '{F_full} came and sat beside {him}. "If you took it home," said {f}, "[it would be dark for the rest of us|who would light the way for the ships]?"',
            ),
            "\n\n",
            (
                '{h} thought about it. "[Then I will just look at it|It can stay where it is]," {he} said.',
                '"You are right," said {h}. "[Good night, moon|I will wave to it every night]!"',
            ),
            (
                "And the moon shone on {him} all the way home.",
                "{He} {joy}, because the moon seemed to smile back.",
                "From then on, {h} put a bowl of water on the window, and every night the moon came to visit.",
            ),
        ),
    ),
    # Coins are saved and given away.
    (
        _ANY,
        (
            (
                "{h} wanted a {look} {toy} from the [shop|market]. It cost ten coins, and {he} had only two.",
                'In the window of the [shop|store] was a {look} {toy}. {h} looked at it every day. "I will save my coins," {he} said.',
            ),
            (
                "{He} helped {g} [wash the dishes|carry wood|feed the hens] and got a coin. {He} [swept the yard|watered the flowers] and got one more.",
                "{He} worked for {while}. {He} [picked {fruit}|carried bags|swept the steps], and {his} jar filled up, coin by coin.",
            ),
            (
                "?",
                "{He} counted them every night. [Three, four, five...|Clink, clink, clink!]",
                "It was hard not to spend them on {treats}, but {he} was strong.",
            ),
            "\n\n",
            (
                "{day}, {he} had enough. {He} ran to the shop. But on the way, {he} saw {f_full}, who was [crying|very sad].",
                "At last, {he} had ten coins. On the way to the shop, {he} met {f_full}. {f_His} eyes were red.",
            ),
            (
                '"[What happened|What is wrong]?" asked {h}. "My little [sister|brother] is [sick|hungry], and [we cannot buy medicine|we have nothing to eat]," said {f}.',
                '"I lost the money for [bread|the milk]," said {f}, "and now [we will have no dinner|my family will be hungry]."',
            ),
            (
                "{h} looked at {his} coins. {He} thought of the {toy}. Then {he} gave the coins to {f}.",
                '{h} did not think for long. "Take these," {he} said and gave {f} the [coins|whole jar].',
            ),
            "\n\n",
            (
                '"[But what about your {toy}|Are you sure]?" asked {f}. "[The {toy} can wait|You need them more]," said {h}.',
                "{f} hugged {him} for a long time. {h} went home without the {toy}, but {his} heart was [light|full].",
            ),
            (
                "A week later, there was a box at the door. In it was the {look} {toy}! The man from the shop had [seen it all|heard what {he} did].",
                'Some days later, {f} came with something in {f_his} hands. It was a {toy}, made of wood. "I made it for you," {f_he} said. It was better than the one in the shop.',
            ),
            ("?", "{h} learned that when you give, you get something back.", '"You have a big heart," said {g}.'),
        ),
    ),
    # A friend is sick.
    (
        _ANY,
        (
            (
                "{day}, {h} wanted to play with {f_full}. But {f} was [sick|in bed with a cold].",
                "{h} and {f_full} wanted to go {place_to}, but {later}, {f} did not come.",
            ),
            (
                '"{f} has to [rest|stay in bed]," said {g}. {h} was sad. It was no fun to play alone.',
                '{h} knocked on the door. "Achoo!" came from inside. {f} was sick.',
            ),
            (
                "?",
                '{h} tried to play with the {toy}, but {he} [kept thinking of {f}|did not like it alone]. "What can I do?" {he} [asked|thought].',
                '"How can I make {f} feel better?" {h} asked {g}. "[What makes you feel better|A little kindness is good medicine]," said {g}.',
            ),
            "\n\n",
            (
                "{h} [made|cooked] a pot of soup with {g}. {He} also took {treats} and a {flower}.",
                "{h} [picked a {flower}|drew a funny picture] and put it in a basket with [warm soup|{treats}] and {his} own {look} {toy}.",
            ),
            (
                "On the way, [the wind blew|it began to rain], but {h} [held the basket tight|kept going].",
                "{He} walked carefully, so that nothing would [fall|spill].",
            ),
            (
                "{f} was [pale|lying under three blankets]. When {f_he} saw {h}, {f_he} [sat up|smiled].",
                '"[Surprise|Hello]!" said {h}. {f} [opened one eye|smiled a weak smile]. "You came!" {f_he} said.',
            ),
            "\n\n",
            (
                "{h} [told|read] {f_him} a story about {tale}. {f} laughed until {f_he} [coughed|forgot the cold].",
                "{f} ate [a little|all of it], and {h} told jokes. Soon {f} had red cheeks again.",
            ),
            (
                "[Two|Three] days later, {f} was well, and they went {place_to}.",
                "The next week, {h} had a cold. And who was at the door with a pot of soup? It was {f}!",
            ),
            ("?", '"You are the best medicine," said {f}.', "{h} learned that friends are there on bad days, too."),
        ),
    ),
    # A bird with a hurt wing.
    (
        _CHILD,
        (
            (
                "{day}, {h} found a [little|blue|small brown] bird {spot}. Its wing was hurt, and it could not fly.",
                "{day}, something fell from the sky {place_in}. It was a [tiny|gray|yellow] bird with a hurt wing.",
            ),
            (
                '"[Do not be afraid|I will take care of you]," {he} said. {He} [carried it home in {his} hat|held it gently in both hands].',
                '{h} ran to get {g}. "Can we help it?" {he} asked. "We can try," said {g}.',
            ),
            (
                "?",
                "They made a [bed|nest] out of a box and [soft grass|an old sock]. {h} gave the bird [seeds|crumbs] and water.",
                "{G} tied a [small|thin] stick to the wing. {h} fed the bird [every hour|with a spoon].",
            ),
            "\n\n",
            (
                "Each day, the bird [sang a little more|got a bit stronger]. {h} [told it stories|sat beside it after school]. They became friends.",
                "{h} named the bird {petname}. {He} talked to it [every evening|all the time], and the bird [listened|sang for {him}].",
            ),
            (
                '[Then|One morning], the bird [flapped its wings|flew around the room]. "It is ready to go," said {g}.',
                "After {while2}, the wing was well. The bird looked out of the window [all day|and wanted to go].",
            ),
            (
                '{sadness} "I do not want it to go," {he} said.',
                '"But I will miss it," said {h}. "[A bird needs the sky|If you love it, let it fly]," said {g}.',
            ),
            "\n\n",
            (
                "{h} opened the window. The bird [sat on {his} finger one last time|looked back once]. Then it flew up [into the blue sky|over the trees].",
                "So {h} took the bird {place_to} and opened {his} hands. Up, up, up it flew!",
            ),
            (
                "The next [spring|morning], {h} heard a song. The bird was back, and it [had a nest|sat] right outside {his} window!",
                '"Goodbye!" called {h}. {He} was sad and happy at the same time.',
            ),
            (
                "?",
                "{h} knew that {he} had done the right thing.",
                "After that, {h} put out seeds for the birds every winter.",
            ),
        ),
    ),
    # A walk in the woods, and the way home.
    (
        _ANY,
        (
            (
                "{day}, {h} and {f_full} went {place_to} to look for {fruit}.",
                '{day}, {h} said to {f_full}, "Let us go {place_to} and see what we can find!"',
            ),
            (
                "?",
                "They walked farther and farther. They passed [a|an old] {landmark} and a {landmark2}, and saw a {flower} as big as a [plate|hat].",
                "They followed a [{look} bird|long line of ants|tiny stream], [up and down|left and right], and did not look back.",
            ),
            (
                'Then {f} stopped. "{h}, [where are we|which way is home]?" {f_he} asked. {h} did not know.',
                'When they wanted to go home, [the path was gone|every path looked the same]. "I think we are lost," said {h}.',
            ),
            "\n\n",
            (
                "?",
                '{f} began to cry. "Do not cry," said {h}, but {he} was scared, too.',
                "It got [dark|cold]. [An owl called.|The trees made strange sounds.]",
            ),
            (
                '"[Let us think|We need a plan]," said {h}. "We came past the {landmark}, and before that past the {landmark2}."',
                '"When we are lost, we should [follow the water|look for the smoke of the houses]," said {h}.',
            ),
            (
                "So they [went back|walked] slowly, [hand in hand|side by side]. First they found the {landmark}, and then they found the {landmark2}.",
                'They listened. They could hear [a bell|water|a dog] far away. "This way!" said {h}.',
            ),
            "\n\n",
            (
                'At last, they saw a light. It was {g} with a lantern! "[There you are|I was so worried]!" {g_he} said.',
                "And there, behind the last [tree|hill], was the [village|house]! They ran the rest of the way.",
            ),
            (
                'They got [warm milk|hot soup] and {treats}. "Next time, [we will leave a trail|we will tell you where we go]," said {h}.',
                '"You kept calm," said {g}. "That was [clever|very smart]."',
            ),
            (
                "?",
                "And from then on, they always looked back to remember the way.",
                '"[It was a real adventure|I was not afraid with you]," said {f}.',
            ),
        ),
    ),
)


# --- Telling ----------------------------------------------------------------------------------------


def _pick(rng: random.Random, options: Sequence[Any]) -> Any:
    """One of the options, by random.random alone: its sequence is the one that Python promises to keep."""
    return options[int(rng.random() * len(options))]


@functools.cache
def _parse(template: str) -> tuple[Any, ...]:
    """A phrasing as nodes: text, ('slot', name), or ('choice', alternatives)."""
    pieces = re.findall(r"[\[\]|]|\{\w+\}|[^\[\]|{}]+", template)
    assert "".join(pieces) == template, f"not a slot: {template}"
    nodes: list[Any] = []
    stack: list[tuple[list[Any], list[list[Any]]]] = []
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

    def __init__(self, rng: random.Random, hero_kinds: tuple[str, ...]):
        self.rng = rng
        self.own_banks: dict[str, tuple[str, ...]] = {}
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
                if isinstance(value, tuple):
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
        rng = self.rng
        species: list[str] = []
        names: list[str] = []
        for role in ("", "f_"):
            girl = rng.random() < 0.5
            self[f"{role}he"], self[f"{role}him"], self[f"{role}his"] = _GIRL if girl else _BOY
            options = ANIMAL_NAMES if kind == "animal" else GIRLS if girl else BOYS
            while (name := _pick(rng, options)) in names:
                pass
            names.append(name)
            options = ANIMALS if kind == "animal" else ("girl",) if girl else ("boy",)
            while (animal := _pick(rng, options)) in species and kind == "animal":
                pass
            species.append(animal)
        self["h"], self["f"] = names
        self["himself"] = "herself" if self["he"] == "she" else "himself"
        self["species"] = species[0]
        self["f_intro"] = f"a {species[1]} named {names[1]}"
        full = f"{names[1]} the {species[1]}" if kind == "animal" else names[1]
        self["f_full"] = _pick(rng, (self["f_intro"], f"{self['his']} friend {full}", full))
        noun, address, pronouns = _pick(rng, GROWN_UPS[kind])
        self["g"] = self.render(noun)
        self["g_name"] = address
        self["g_he"], self["g_him"], self["g_his"] = pronouns

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
    """Write at least size_mb (1e6 bytes) of stories with END_OF_TEXT after each, atomically; returns their number.

    The same seed gives the same bytes.

    Raises:
        ValueError: size_mb is not positive. OSError: path cannot be written.
    """
    require(size_mb > 0, f"size_mb is {size_mb}; it must be positive")
    rng = random.Random(seed)
    count = written = 0
    with records.atomic_path(path) as temporary, temporary.open("wb") as file:
        while written < size_mb * 1e6:
            written += file.write(f"{story(rng)}\n{END_OF_TEXT}\n".encode())
            count += 1
    return count
