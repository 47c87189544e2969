"""What the embedded base can draw: its nouns, styles and colours, and how a prompt names them."""

from __future__ import annotations

from types import MappingProxyType

_NOUNS = """
monkey-face=monkey dog-face=dog wolf fox raccoon cat-face=cat lion tiger-face=tiger horse-face=horse unicorn zebra
deer cow-face=cow pig-face=pig camel giraffe elephant mouse-face=mouse rabbit-face=rabbit hedgehog bat bear koala
panda sloth kangaroo rooster baby-chick=chick penguin eagle duck swan owl flamingo peacock parrot frog crocodile
turtle lizard snake dragon spouting-whale=whale dolphin shark tropical-fish blowfish octopus spiral-shell=shell
crab shrimp snail butterfly bug honeybee=bee lady-beetle=ladybug spider cherry-blossom rose sunflower tulip
potted-plant evergreen-tree=pine-tree deciduous-tree=tree palm-tree cactus four-leaf-clover=clover maple-leaf
mushroom grapes watermelon lemon banana pineapple red-apple=apple pear peach cherries strawberry blueberries
kiwi-fruit=kiwi tomato avocado eggplant carrot ear-of-corn=corn hot-pepper=chili bell-pepper broccoli onion bread
croissant pretzel pancakes cheese-wedge=cheese hamburger french-fries=fries pizza hot-dog taco cooking=fried-egg
popcorn ice-cream doughnut=donut cookie birthday-cake=cake cupcake lollipop hot-beverage=coffee teapot
wine-glass=wine beer-mug=beer volcano house castle tent bus fire-engine taxi automobile=car tractor bicycle anchor
sailboat airplane=plane helicopter rocket alarm-clock sun star cloud rainbow umbrella snowflake snowman fire
jack-o-lantern christmas-tree balloon wrapped-gift=gift trophy soccer-ball basketball teddy-bear glasses crown
top-hat gem-stone=diamond bell guitar violin drum television camera light-bulb candle open-book=book key hammer
scissors
"""
_PLURAL = frozenset({"grapes", "cherries", "blueberries", "pancakes", "fries", "glasses", "scissors"})
_MASS = frozenset({"bread", "cheese", "popcorn", "wine", "beer", "coffee", "corn", "broccoli", "fire"})


def _read_nouns() -> dict[str, str]:
    subjects = {}
    for entry in _NOUNS.split():
        icon, _, noun = entry.partition("=")
        noun = noun or icon
        subjects[noun.replace("-", " ")] = icon
    return subjects


SUBJECTS: MappingProxyType[str, str] = MappingProxyType(_read_nouns())
"""Noun of the prompt -> icon name, the same in every picture set."""

STYLE_SET_SUBJECTS = tuple(SUBJECTS)[1::4]
"""The 40 subjects of every bundled style set; the other 120 are held out for measuring."""

VENDOR_STYLES = MappingProxyType(
    {"noto": "noto", "flat": "fluent-emoji-flat", "clay": "fluent-emoji", "blob": "noto-v1"}
)
"""Style word -> icon package of the pictures the base has seen."""

RENDERED_STYLES = ("sketch", "chalk", "silhouette", "pastel", "sepia")
"""Styles computed from the Noto pictures that the base has seen."""

HELD_OUT_STYLES = ("blueprint", "duotone", "night", "lineart")
"""Styles that no part of the base has seen: kept for adapters."""

COLOURS = MappingProxyType(
    {
        "red": (214, 48, 49),
        "orange": (243, 146, 55),
        "yellow": (250, 215, 75),
        "green": (88, 170, 80),
        "blue": (64, 120, 216),
        "purple": (140, 82, 190),
        "pink": (245, 150, 190),
        "gray": (150, 152, 158),
        "black": (28, 28, 32),
    }
)
"""Colour word -> sRGB value, 0 to 255, of the background it names; all but gray and black also colour subjects."""

SUBJECT_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")


def phrase(noun: str, colour: str | None = None) -> str:
    """Returns the noun with colour and article as prompts say it: "a red fox", "an owl", "green grapes"."""
    words = f"{colour} {noun}" if colour else noun
    if noun in _PLURAL or noun in _MASS:
        return words
    if noun == "sun":
        return f"the {words}"
    return f"{'an' if words[0] in 'aeio' or words.startswith('umb') else 'a'} {words}"


def caption(noun: str, *, colour: str | None = None, background: str | None = None, style: str | None = None) -> str:
    """Returns the prompt that names a picture, such as "a red fox on a blue background, sketch style"."""
    text = phrase(noun, colour)
    if background:
        text += f" on {'an' if background[0] in 'aeio' else 'a'} {background} background"
    return f"{text}, {style} style" if style else text
