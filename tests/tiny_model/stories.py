"""A seeded grammar of little stories: the training and held-out text of the tiny model.

A story has two people, a few scenes and a saying that is quoted once and recalled at the end. Two things make
it easier to tell for a model that has learnt the grammar, and both suffer when a quantizer does harm:
most of what follows the first mention of a thing is decided by the story so far (who holds what, how many are
left, what was said), and some of it by facts that hold in all stories (where people are on which day, whose
the animals are, what things cost), which fit nowhere but in the weights.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass


def words(text: str) -> list[str]:
    return text.split()


SHE_NAMES = words("Ada Bella Clara Dora Ella Freya Greta Hanna Ida Julia Kira Lena Mira Nora Olga Petra")
HE_NAMES = words("Adam Boris Carl David Emil Felix Georg Hugo Ivan Jonas Karl Leo Max Nils Oscar Paul")
PET_NAMES = words("Biscuit Button Comet Daisy Ginger Misty Pepper Rusty Shadow Sunny Tiger Waffle")
JOBS = words("baker builder carpenter doctor farmer gardener miller painter potter sailor singer smith tailor")
ANIMALS = words("cat cow dog donkey duck frog goat hen horse lamb mouse owl pig rabbit")
THINGS = words(
    "apple basket bell book bottle bowl brush button candle coin cup drum flower flute hammer hat jar key "
    "lamp lantern map mirror nut pear pencil pillow plum ribbon ring rope shell spoon stone"
)
COLOURS = words("black blue brown golden green grey orange pink purple red silver white yellow")
QUALITIES = words("broken clean dusty heavy little lovely old plain shiny strange tiny warm")
PLACES = words(
    "barn bridge castle cave church forest garden gate harbour hill kitchen lake market meadow mill "
    "orchard river school tower village well"
)
PREPOSITIONS = words("behind below beside near outside")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MOODS = words("angry brave busy calm curious glad hungry lonely proud quiet sad sleepy")
NUMBERS = words("no one two three four five six seven eight nine ten")
IRREGULAR_PLURALS = {"brush": "brushes", "mouse": "mice"}

# The facts of the stories' world: the same for every seed of the text.
WORLD = random.Random(0)
HABITS = {(name, day): WORLD.choice(PLACES) for name in SHE_NAMES + HE_NAMES for day in DAYS}
OWNERS = {(colour, animal): WORLD.choice(SHE_NAMES + HE_NAMES) for colour in COLOURS for animal in ANIMALS}
PRICES = {thing: WORLD.randint(11, 49) for thing in THINGS}


@dataclass(frozen=True)
class Person:
    """Somebody in a story, with the pronouns that must agree with the name."""

    name: str
    subject: str
    obj: str
    possessive: str


Scene = Callable[[random.Random, Person, Person], str]


def plural(noun: str, count: int) -> str:
    """The noun in the number that goes with `count` (only 1 takes the singular)."""
    return noun if count == 1 else IRREGULAR_PLURALS.get(noun, noun + "s")


def counted(count: int, noun: str) -> str:
    return f"{NUMBERS[count]} {plural(noun, count)}"


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeio" else f"a {word}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def join_and(items: list[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1]


def choose_people(rng: random.Random) -> tuple[Person, Person]:
    """Two different people, each with the pronouns of their list of names."""
    names = rng.sample(SHE_NAMES + HE_NAMES, 2)
    first, second = (
        Person(name, "she", "her", "her") if name in SHE_NAMES else Person(name, "he", "him", "his") for name in names
    )
    return first, second


def choose_spot(rng: random.Random) -> str:
    return f"{rng.choice(PREPOSITIONS)} the {rng.choice(PLACES)}"


def choose_saying(rng: random.Random) -> str:
    """A clause that one person says and the other must recall word for word."""
    thing, colour, mood = rng.choice(THINGS), rng.choice(COLOURS), rng.choice(MOODS)
    animal, place, day = rng.choice(ANIMALS), rng.choice(PLACES), rng.choice(DAYS)
    return rng.choice(
        [
            f"the {colour} {thing} is {choose_spot(rng)}",
            f"the {animal} from the {place} will be {mood} on {day}",
            f"never carry {article(colour)} {thing} to the {place}",
            f"on {day} the {mood} {animal} goes to the {place}",
        ]
    )


def tell_gift(rng: random.Random, giver: Person, taker: Person) -> str:
    """Subtraction in words: what is given away is missing afterwards."""
    had = rng.randint(2, 9)
    given = rng.randint(1, had - 1)
    thing, colour = rng.choice(THINGS), rng.choice(COLOURS)
    reason = rng.choice(["was a good friend", "had none", f"was {rng.choice(MOODS)}"])
    return (
        f"{giver.name} had {NUMBERS[had]} {colour} {plural(thing, had)}. Because {taker.name} {reason}, "
        f"{giver.name} gave {taker.obj} {counted(given, thing)}. Now {giver.name} had "
        f"{counted(had - given, thing)} and {taker.name} had {counted(given, thing)}."
    )


def tell_counting(rng: random.Random, counter: Person, other: Person) -> str:
    """Counting up to a number, then one step further or back."""
    count, animal = rng.randint(3, 9), rng.choice(ANIMALS)
    change, event = rng.choice([(1, "came"), (-1, "ran away")])
    now = count + change
    which = "another" if change > 0 else "one"
    return (
        f"{counter.name} counted the {plural(animal, 2)} {choose_spot(rng)}: "
        f"{', '.join(NUMBERS[1 : count + 1])}. There were {counted(count, animal)}. Then {which} {animal} "
        f'{event}. "Now there are {counted(now, animal)}," said {other.name}.'
    )


def tell_sums(rng: random.Random, asker: Person, answerer: Person) -> str:
    """Sums and differences of one-digit numbers, written in digits."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        left, right = rng.randint(1, 9), rng.randint(1, 9)
        total = left + right
        lines.append(rng.choice([f"{left} + {right} = {total}", f"{total} - {left} = {right}"]))
    return f"{asker.name} gave {answerer.name} some sums, and {answerer.subject} wrote:\n" + "\n".join(lines)


def tell_shopping(rng: random.Random, buyer: Person, helper: Person) -> str:
    """A list that is bought in order; sometimes one thing on it cannot be had."""
    things = rng.sample(THINGS, rng.randint(2, 4))
    items = [counted(rng.randint(1, 6), thing) for thing in things]
    text = f"{buyer.name} wrote a list for {helper.name}:\n" + "\n".join(f"- {item}" for item in items)
    text += f"\nOn {rng.choice(DAYS)} {helper.name} went to the market with {buyer.possessive} list. "
    if len(items) == 2 or rng.random() < 0.5:
        return text + f"{capital(helper.subject)} bought {join_and(items)}."
    missing = rng.randrange(len(items))
    bought = items[:missing] + items[missing + 1 :]
    return text + (f"There were no {plural(things[missing], 2)}, so {helper.subject} bought {join_and(bought)}.")


def tell_search(rng: random.Random, seeker: Person, friend: Person) -> str:
    """A question answered in the words of the question, then acted upon."""
    thing, quality, spot = rng.choice(THINGS), rng.choice(QUALITIES), choose_spot(rng)
    mood = rng.choice(MOODS)
    return (
        f'"Where is my {quality} {thing}?" asked {seeker.name}. "Your {quality} {thing} is {spot}," said '
        f"{friend.name}. So {seeker.name} looked {spot}, and there {seeker.subject} found "
        f"{seeker.possessive} {quality} {thing}. {seeker.name} was {mood} and thanked {friend.name}."
    )


def tell_boxes(rng: random.Random, hider: Person, opener: Person) -> str:
    """Pairs of a colour and a thing: the colour asked for decides the thing found."""
    colours, things = rng.sample(COLOURS, 3), rng.sample(THINGS, 3)
    hidden = join_and([f"the {thing} in the {colour} box" for colour, thing in zip(colours, things, strict=True)])
    first, second = rng.sample(range(3), 2)
    return (
        f"{hider.name} put {hidden}. {opener.name} opened the {colours[first]} box and found the "
        f"{things[first]}. Then {opener.subject} opened the {colours[second]} box and found the "
        f"{things[second]}."
    )


def tell_line(rng: random.Random, watcher: Person, other: Person) -> str:
    """A chain of "behind" whose two ends must be named."""
    last, middle, first = rng.sample(ANIMALS, 3)
    return (
        f"{watcher.name} and {other.name} watched the animals {choose_spot(rng)}. The {last} stood behind "
        f"the {middle}, and the {middle} stood behind the {first}. So the {first} was the first and the "
        f"{last} was the last."
    )


def tell_song(rng: random.Random, singer: Person, echo: Person) -> str:
    """A list of words, repeated backwards."""
    words = rng.sample(rng.choice([COLOURS, ANIMALS, PLACES]), rng.randint(3, 5))
    return f'{singer.name} sang, "{", ".join(words)}." {echo.name} sang it backwards, "{", ".join(reversed(words))}."'


def tell_days(rng: random.Random, worker: Person, other: Person) -> str:
    """Days in their order, with a plural or a singular verb for the animals that wait."""
    day, count, animal = rng.randrange(len(DAYS)), rng.randint(1, 4), rng.choice(ANIMALS)
    place, verb = rng.choice(PLACES), "waits" if count == 1 else "wait"
    return (
        f'"On {DAYS[day]} I go to the {place}," said {worker.name}, "and {counted(count, animal)} {verb} '
        f'there for me." "And on {DAYS[(day + 1) % 7]}?" asked {other.name}. "On {DAYS[(day + 1) % 7]} the '
        f'{plural(animal, count)} from the {place} {verb} for you."'
    )


def tell_habits(rng: random.Random, first: Person, second: Person) -> str:
    """Facts of the world: where the two people are on some days."""
    text = f"Everybody knows the week of {first.name} and {second.name}."
    for person in (first, second):
        one, two = rng.sample(DAYS, 2)
        text += (
            f" On {one} {person.name} is at the {HABITS[person.name, one]}, and on {two} {person.subject} is "
            f"at the {HABITS[person.name, two]}."
        )
    return text


def tell_owners(rng: random.Random, asker: Person, knower: Person) -> str:
    """Facts of the world: whose the animals are."""
    pairs = zip(rng.sample(COLOURS, 4), rng.sample(ANIMALS, 4), strict=True)
    answers = [f"the {colour} {animal} is {OWNERS[colour, animal]}'s" for colour, animal in pairs]
    return f'"Whose are the animals?" asked {asker.name}. "{capital(join_and(answers))}," said {knower.name}.'


def tell_prices(rng: random.Random, buyer: Person, seller: Person) -> str:
    """Facts of the world, then arithmetic with two digits: prices, their sum, the change."""
    things = rng.sample(THINGS, 2)
    costs = [f"the {thing} costs {PRICES[thing]} pence" for thing in things]
    total = sum(PRICES[thing] for thing in things)
    paid = 10 * (total // 10 + rng.randint(1, 2))
    return (
        f'"{capital(join_and(costs))}," said {seller.name}. {buyer.name} took both for {total} pence. '
        f"{capital(buyer.subject)} paid {paid} pence and got {paid - total} pence back."
    )


KNOWLEDGE: tuple[Scene, ...] = (tell_habits, tell_owners, tell_prices)
SCENES: tuple[Scene, ...] = (
    tell_gift,
    tell_counting,
    tell_sums,
    tell_shopping,
    tell_search,
    tell_boxes,
    tell_line,
    tell_song,
    tell_days,
)


def write_story(rng: random.Random) -> str:
    """One story: an opening with a pet and a saying, three scenes, and an ending that recalls both."""
    hero, friend = choose_people(rng)
    pet, animal, mood = rng.choice(PET_NAMES), rng.choice(ANIMALS), rng.choice(MOODS)
    saying = choose_saying(rng)
    opening = (
        f"{hero.name} was {article(rng.choice(JOBS))} who lived {choose_spot(rng)}. {capital(hero.subject)} "
        f"had {article(rng.choice(COLOURS))} {animal} called {pet}. One day {hero.name} met {friend.name}. "
        f'"{capital(saying)}," said {friend.name}.'
    )
    chosen = [rng.choice(KNOWLEDGE), *rng.sample(SCENES, 2)]
    rng.shuffle(chosen)
    scenes = [scene(rng, *rng.sample([hero, friend], 2)) for scene in chosen]
    ending = (
        f"That night {hero.name} was {mood}. {capital(hero.subject)} told {hero.possessive} {animal} what "
        f'{friend.name} had said: "{capital(saying)}." And {pet} was {mood} too.'
    )
    return "\n".join([opening, *scenes, ending])


def write_stories(count: int, seed: int) -> list[str]:
    """`count` stories; the same seed gives the same stories."""
    rng = random.Random(seed)
    return [write_story(rng) for _ in range(count)]
