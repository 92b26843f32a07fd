"""What the world's scenes are made of: objects in order, and the concepts kept for LoRAs."""

from typing import NamedTuple

# The first N are used, so the order is from the easiest to tell apart to the hardest. Code points name the emoji.
OBJECTS = {
    "fox": "1f98a", "panda": "1f43c", "lion": "1f981", "penguin": "1f427",
    "robot": "1f916", "car": "1f697", "tree": "1f333", "crown": "1f451",
    "frog": "1f438", "pig": "1f437", "pumpkin": "1f383", "mushroom": "1f344",
    "rocket": "1f680", "octopus": "1f419", "balloon": "1f388", "cactus": "1f335",
    "cat": "1f431", "koala": "1f428", "whale": "1f433", "house": "1f3e0",
    "tiger": "1f42f", "strawberry": "1f353", "bee": "1f41d", "guitar": "1f3b8",
    "monkey": "1f435", "turtle": "1f422", "star": "2b50", "cake": "1f382",
    "rabbit": "1f430", "bus": "1f68c", "crab": "1f980", "apple": "1f34e",
    "dog": "1f436", "butterfly": "1f98b", "castle": "1f3f0", "banana": "1f34c",
    "elephant": "1f418", "sailboat": "26f5", "ghost": "1f47b", "pizza": "1f355",
    "bear": "1f43b", "snail": "1f40c", "sunflower": "1f33b", "drum": "1f941",
    "cow": "1f42e", "snowman": "26c4", "gift": "1f381", "key": "1f511",
    "chick": "1f424", "alien": "1f47d", "clock": "23f0",
    "mouse": "1f42d", "football": "26bd",
}  # fmt: skip

# Objects that are a face looking at you: what can wear something.
FACES = ("fox", "panda", "lion", "robot", "frog", "pig", "cat", "koala", "tiger", "monkey", "rabbit", "dog", "bear", "cow")

# Never drawn for the base: each is learned by a LoRA.
CHARACTERS = {
    "raccoon": "1f99d", "owl": "1f989", "unicorn": "1f984", "dragon": "1f432",
    "wolf": "1f43a", "hedgehog": "1f994",
}  # fmt: skip
THINGS = {"bicycle": "1f6b2", "umbrella": "2614", "rose": "1f339"}
HELD_OBJECTS = CHARACTERS | THINGS


class Worn(NamedTuple):
    """Something to wear: its code point, its width as a share of the wearer's, and where its centre lies on the wearer.

    y is 0 at the wearer's upper edge and 1 at the lower; the wearer moves down by ``room`` of the picture to leave space.
    """

    code: str
    wide: float
    y: float
    room: float


# Never drawn for the base either; a character wears them.
WORN = {
    "top hat": Worn("1f3a9", 0.72, -0.08, 0.06),
    "sunglasses": Worn("1f576", 0.78, 0.47, 0.0),
    "scarf": Worn("1f9e3", 0.62, 1.12, -0.07),
}


def article(name: str) -> str:
    """``fox`` -> ``a fox``, ``octopus`` -> ``an octopus``; ``unicorn`` sounds like a consonant; ``sunglasses`` are many."""
    if name.endswith("glasses"):
        return name
    vowel = name[0] in "aeiou" and not name.startswith("uni")
    return f"{'an' if vowel else 'a'} {name}"
