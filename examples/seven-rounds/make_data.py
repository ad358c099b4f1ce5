"""Writes data/<task>/train.json and data/<task>/test.json of seven small tasks, and data/old.jsonl.

python3 examples/seven-rounds/make_data.py
"""

import json
import pathlib
import random

FOLDER = pathlib.Path(__file__).parent / "data"
TRAIN = 24

CAPITALS = """France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Greece Athens, Cuba Havana, Peru Lima,
Norway Oslo, Sweden Stockholm, Poland Warsaw, Austria Vienna, Portugal Lisbon, Ireland Dublin, China Beijing, Kenya Nairobi,
Russia Moscow, Germany Berlin, Canada Ottawa, Turkey Ankara, Finland Helsinki, Denmark Copenhagen, Hungary Budapest,
Belgium Brussels, Iran Tehran, Iraq Baghdad, Chile Santiago, Thailand Bangkok, Ukraine Kyiv, Vietnam Hanoi, Nepal Kathmandu,
Syria Damascus"""
OPPOSITES = """hot cold, big small, tall short, fast slow, old young, rich poor, full empty, hard soft, light dark, up down,
left right, early late, open closed, happy sad, high low, wet dry, clean dirty, strong weak, loud quiet, near far, good bad,
true false, first last, day night, north south, east west, win lose, buy sell, push pull, love hate, thick thin, wide narrow"""
PLURALS = """cat cats, dog dogs, house houses, box boxes, city cities, man men, woman women, child children, foot feet,
tooth teeth, mouse mice, goose geese, leaf leaves, knife knives, life lives, wolf wolves, baby babies, lady ladies, bus buses,
glass glasses, dish dishes, potato potatoes, hero heroes, book books, tree trees, car cars, shelf shelves, story stories,
fox foxes, class classes, loaf loaves, party parties"""
PASTS = """go went, see saw, eat ate, run ran, take took, give gave, come came, make made, find found, write wrote, sing sang,
swim swam, drink drank, drive drove, break broke, speak spoke, know knew, grow grew, fly flew, begin began, think thought,
buy bought, bring brought, teach taught, sleep slept, keep kept, feel felt, leave left, win won, sit sat, stand stood,
tell told"""
COLOURS = """grass green, snow white, coal black, blood red, sky blue, lemon yellow, carrot orange, milk white, tomato red,
banana yellow, leaf green, night black, sea blue, rose red, chalk white, sun yellow, frog green, ash grey, chocolate brown,
cherry red, salt white, pumpkin orange, pea green, butter yellow, strawberry red, soil brown, cloud white, cucumber green,
elephant grey, tar black, ruby red, emerald green"""
OLD = [
    ("How many legs does a spider have?", ["eight", "six", "four", "two"]),
    ("What do bees make?", ["honey", "milk", "bread", "wool"]),
    ("Which animal barks?", ["a dog", "a cat", "a cow", "a fish"]),
    ("What is frozen water called?", ["ice", "steam", "sand", "oil"]),
    ("Which planet do we live on?", ["Earth", "Mars", "Venus", "Saturn"]),
    ("What do plants need to grow?", ["sunlight", "plastic", "smoke", "noise"]),
    ("Which season comes after winter?", ["spring", "autumn", "summer", "night"]),
    ("What does a clock show?", ["the time", "the weather", "the price", "the weight"]),
    ("Where do fish live?", ["in water", "in trees", "in the sky", "in books"]),
    ("What does a baker make?", ["bread", "shoes", "cars", "paper"]),
    ("Which of these is a fruit?", ["an apple", "a carrot", "a stone", "a spoon"]),
    ("What do we use to see?", ["our eyes", "our ears", "our feet", "our hands"]),
]


def pairs(text, question):
    return [(question.format(a), b) for a, b in (pair.split() for pair in text.split(","))]


def tasks(random_state):
    sums = [(f"{a} + {b} =", str(a + b)) for a in range(1, 10) for b in range(1, 10)]
    words = [pair.split()[0] for pair in (OPPOSITES + "," + PLURALS).split(",")]
    yield "capital", pairs(CAPITALS, "Capital of {}:")
    yield "opposite", pairs(OPPOSITES, "Opposite of {}:")
    yield "plural", pairs(PLURALS, "Plural of {}:")
    yield "past", pairs(PASTS, "Past tense of {}:")
    yield "sum", random_state.sample(sums, 32)
    yield "letter", [(f"First letter of {w}:", w[0]) for w in random_state.sample(sorted(set(words)), 32)]
    yield "colour", pairs(COLOURS, "Colour of {}:")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def main():
    random_state = random.Random(1)
    for name, rows in tasks(random_state):
        assert len(rows) == 32, (name, len(rows))
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in random_state.sample(rows, len(rows))]
        write(FOLDER / name / "train.json", rows[:TRAIN])
        write(FOLDER / name / "test.json", rows[TRAIN:])
    lines = []
    for query, choices in OLD:
        right = choices[0]
        choices = random_state.sample(choices, len(choices))
        lines.append(json.dumps({"query": query, "choices": choices, "gold": choices.index(right)}))
    (FOLDER / "old.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
