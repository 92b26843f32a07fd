"""Phrases of all kinds, against which a LoRA's answer to one phrase is judged: what it says of these is chance (`suggest`)."""

from collections.abc import Sequence

MOST = 240  # phrases; their mean and spread are then known to a tenth of the spread

GENERAL = tuple("""
a cat;a dog;a horse;a bird;a fish;a bear;a spider;a snake;a butterfly;a cow;an elephant;a frog;a shark;a monkey;a mouse;a rabbit
a man;a woman;a child;an old man;a soldier;a king;a nurse;a dancer;a wizard;a robot;an angel;a ghost;a pirate;a cowboy;a clown;a mermaid
a tree;a flower;grass;a cactus;a mushroom;leaves;a rose;a bamboo grove;moss;vines;an apple;bread;a cake;noodles;a cup of coffee;ice cream;cheese
a car;a truck;a bicycle;a train;a ship;an aeroplane;a spaceship;a tank;a motorcycle;a bus;a helicopter;a bridge;a road;a tower;a church
a house;a castle;a skyscraper;a barn;a tent;a ruin;a library;a kitchen;a bedroom;a bathroom;a school;a factory;a market;a restaurant;a museum
a mountain;a lake;a river;the sea;a desert;a forest;a cave;a waterfall;an island;a volcano;a glacier;a field;a garden;a swamp;the moon;the sky
rain;snow;fog;a storm;lightning;sunset;night;morning light;a rainbow;stars;clouds;smoke;fire;dust;ice;water
a hat;a dress;a coat;boots;glasses;a scarf;armour;a kimono;a uniform;jewellery;a mask;gloves;a crown;tattoos;long hair;a beard
a guitar;a piano;a book;a clock;a phone;a computer;a lamp;a chair;a table;a sword;a gun;a ball;a balloon;a camera;a mirror;a candle;a key
oil painting;watercolour;pencil sketch;comic book;pixel art;photograph;black and white;anime;low poly;clay;origami;stained glass;graffiti;mosaic
neon lights;gold;silver;glass;wood;stone;metal;plastic;paper;fur;feathers;silk;rust;crystal;marble;leather
smiling;crying;running;flying;sleeping;fighting;dancing;swimming;reading;eating;close-up;wide shot;from above;from behind;symmetrical;blurred
red;green;blue;yellow;purple;pink;orange;white;black;pastel colours;dark;bright;colourful;minimal;detailed;old
science fiction;fantasy;horror;romance;war;sport;music;medicine;farming;travel;underwater;medieval;futuristic;steampunk;cyberpunk;tropical
""".strip().replace("\n", ";").split(";"))  # fmt: skip


def phrases(known: Sequence[str] = (), least: int = 60) -> tuple[str, ...]:
    """Phrases for a null: those that the judge was trained on where it names enough, evenly spread, else `GENERAL`.

    known: what a small judge has words for; it says nothing useful of others.
    """
    if len(known) < least:
        return GENERAL[:MOST]
    names = sorted(known)
    step = max(1, len(names) // MOST)
    return tuple(names[::step][:MOST])
