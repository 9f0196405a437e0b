"""The strings that scenes show: words, codes, numbers and prices. Knows nothing about drawing."""

from __future__ import annotations

import numpy as np

# letters and digits that small print does not confuse with one another; words and numbers use the full set
CODE_CHARACTERS = "ACDEFHJKLMNPRTUVWXY34679"
WORDS = (
    "OPEN EXIT STOP SALE HOTEL CAFE BANK PARK TAXI MENU GATE ROOM SHOP FIRE LIFT STAIRS PUSH PULL DANGER WET "
    "NORTH SOUTH EAST WEST "
    "LEFT RIGHT SLOW FAST HOT COLD NEW OLD FREE FULL EMPTY SAFE HELP INFO BUS TRAIN PLANE FERRY TRAM METRO "
    "RIVER LAKE BEACH FOREST "
    "HILL ROCK SAND SNOW RAIN WIND STORM CLOUD SUN MOON STAR EARTH GOLD SILVER IRON STEEL WOOD PAPER GLASS "
    "STONE BRICK HOUSE TOWER "
    "BRIDGE ROAD TRACK DOCK PORT FARM FIELD BARN TIGER LION BEAR WOLF FOX OTTER EAGLE HAWK OWL ROBIN SWAN "
    "GOOSE HORSE COW SHEEP GOAT "
    "PIANO DRUM FLUTE VIOLA HARP CHESS TENNIS GOLF RUGBY POLO JUDO LONDON PARIS ROME OSLO BERLIN MADRID LIMA "
    "TOKYO DELHI CAIRO"
).split()
ITEMS = (
    "BREAD MILK EGGS TEA COFFEE SUGAR SALT RICE PASTA BEANS SOUP APPLE PEAR PLUM LEMON GRAPE ONION LEEK CORN "
    "HAM FISH BEEF CAKE PIE JAM HONEY SOAP NUTS"
).split()
FIELDS = "NAME CODE GATE SEAT ROOM DATE TIME PRICE SIZE LOT TEAM LINE".split()
LEXICON = sorted({*WORDS, *ITEMS, *FIELDS, "TOTAL"})


def word(rng: np.random.Generator) -> str:
    return str(rng.choice(WORDS))


def code(rng: np.random.Generator, shortest: int = 2, longest: int = 4) -> str:
    return "".join(rng.choice(list(CODE_CHARACTERS), rng.integers(shortest, longest + 1)))


def number(rng: np.random.Generator, shortest: int = 2, longest: int = 4) -> str:
    return "".join(rng.choice(list("0123456789"), rng.integers(shortest, longest + 1)))


def price(rng: np.random.Generator) -> str:
    whole, tenths = rng.integers(0, 20), rng.integers(0, 10)
    cents = rng.choice(list("05")) if rng.random() < 0.5 else rng.integers(0, 10)
    return f"{whole}.{tenths}{cents}"


def anything(rng: np.random.Generator) -> str:
    """A word, a code or a number, as found on signs and labels. Few words: their shape gives them away unread."""
    draw = rng.random()
    return word(rng) if draw < 0.25 else code(rng) if draw < 0.7 else number(rng)
