"""Prompts for the prose sampler: a question a user might ask, and a hidden instruction that keeps the answer simple.

    python training/prompts.py --wordnet DIR --tokenizer DIR --count 400000 --out prompts.npz --text prompts.jsonl

DIR of --wordnet holds index.sense (WordNet 3.0); --tokenizer is SmolLM2's, as saved by transformers from the GGUF.
The .npz holds padded token ids, lengths, a temperature per prompt and an additive mask of the tokens that may be
sampled (printable ASCII and the end mark); the .jsonl holds {"kind", "ask"} per prompt, the part the demo model sees.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np

NAMES = """Anna Ben Clara David Emma Finn Grace Henry Ida Jack Kate Leo Lily Max Mia Nora Oliver Paul Rosa Sam Tom Una
Victor Wendy Zoe Alice Peter Lucy Mark Sara John Mary Daniel Ella George Hannah Jane Luke Maya Noah Ruth Simon Tim
Molly Oscar Amy Eva Hugo Nina Omar Priya Ravi Mei Kenji Carlos Elena Aisha Kofi Ivan Olga""".split()
ANIMALS = """fox bear rabbit mouse owl cat dog duck frog turtle squirrel hedgehog wolf deer horse donkey pig goat sheep
hen crow sparrow bee ant spider butterfly snail fish whale dolphin seal penguin lion tiger elephant monkey giraffe
camel parrot swan goose beaver badger mole otter dragon puppy kitten lamb bird""".split()
PEOPLE = """farmer baker fisherman teacher doctor nurse sailor painter gardener tailor carpenter king queen prince
princess shepherd miller cook musician writer old_man old_woman little_girl little_boy grandmother grandfather soldier
clockmaker postman librarian blacksmith traveler merchant pilot scientist inventor shopkeeper wizard""".split()
TRAITS = """brave kind lazy clever shy curious lonely happy sad proud greedy gentle honest foolish wise tired hungry
friendly careful careless patient angry quiet noisy tiny strong poor rich generous stubborn cheerful grumpy""".split()
FEELINGS = "happy sad tired bored good bad strange busy lonely nervous excited sick hungry quiet".split()
PLACES = """forest village farm city river lake mountain beach island garden kitchen school market library harbor
castle bridge train_station old_house meadow cave desert park hospital museum ship mill barn field valley bakery
hotel lighthouse snowy_town small_shop playground attic workshop""".split()
THINGS = """key lamp hat boat kite letter book map clock bell ring coat shoe ball basket box bottle mirror candle
painting violin drum flute umbrella bicycle wagon ladder rope stone seed flower tree apple cake loaf_of_bread pie egg
coin blanket toy_train doll puppet star cloud feather shell door window bridge well nest snowman kite pencil chair
table teapot spoon button pocket_watch lantern whistle fence garden wheel""".split()
EVENTS = """loses something important|finds a new friend|learns to share|gets lost|is afraid of the dark|helps a
stranger|goes on a long journey|tells a lie and is sorry|plants a garden|builds a boat|wins a race|waits for the
rain|moves to a new home|learns to swim|bakes a cake|has a bad dream|makes a mistake|saves a friend|finds a secret
door|visits the sea for the first time|wants to fly|cannot sleep|breaks something|receives a letter|keeps a
promise|solves a mystery|learns to read|spends a day alone|sees snow for the first time|repairs an old clock|loses a
game|gives away a treasure|goes to the market|catches a cold|meets a talking animal|hears a strange noise|follows a
map|crosses a river|gets a surprise|says goodbye|returns home after many years|learns a new song|paints a
picture|helps in the harvest|climbs a mountain|forgets a birthday|misses the train|shares the last piece of
bread""".replace("\n", " ").split("|")
SKILLS = """swim|cook rice|bake bread|read faster|sleep better|make new friends|save money|grow tomatoes|draw a
face|write a letter|learn a language|ride a bicycle|stay healthy|clean my room|study for a test|be more patient|make
tea|take good photos|play the piano|run a long distance|plan a trip|care for a dog|stop worrying|speak in public|wake
up early|fix a flat tire|pack a suitcase|make a salad|learn to dance|remember names|use less water|stay warm in
winter|help a sad friend|say sorry|choose a gift|find a job|write a story|learn math|grow flowers|cook an egg|boil
potatoes|wash a wool sweater|paint a wall|read a map|build a birdhouse|train a puppy|be a good neighbor|eat less
sugar|drink more water|start a garden|organize my desk|prepare for a storm|treat a small cut|make soup|stay calm|be
polite|learn the guitar|tie a knot|sharpen a knife|remove a stain|teach a child to read|learn chess""".replace(
    "\n", " "
).split("|")
TOPICS = """the weather|a lost dog|dinner|a birthday party|school|a new job|a trip to the sea|their favorite
books|gardening|a broken window|music|a football game|the moon|money|cooking|an old friend|winter|a train
journey|homework|pets|the news|a holiday|health|a long walk|a new house|a dream|their families|the future|a good
film|a mistake|shopping|fishing|the stars|a storm|sleep|breakfast|art|bicycles|a secret|kindness""".replace(
    "\n", " "
).split("|")
WHY = """is the sky blue|do birds sing|do leaves fall in autumn|does ice float|do we sleep|do cats purr|is the sea
salty|do we need water|does the moon change shape|do people cry|do dogs bark|do bees make honey|is exercise good for
us|do plants need light|do we have seasons|does bread rise|do stars shine|does metal rust|do we dream|is honesty
important|do people tell stories|do we have friends|does thunder follow lightning|do fish have gills|do volcanoes
erupt|is reading good for you|do we laugh|do boats float|do trees have roots|does milk turn sour|is fire hot|do people
travel|do children play|do we go to school|do rivers flow to the sea|do we wear clothes|do magnets attract iron|does
rain fall|do we shake hands|do birds fly south in winter|do we have two eyes|is salt used in food|do people work|do
spiders make webs|do we celebrate birthdays|do mountains have snow|are bridges important|is sugar sweet|do bears sleep
in winter|does wood burn|do we get hungry|does the wind blow|do owls hunt at night|are vegetables healthy|do we
brush our teeth""".replace("\n", " ").split("|")
SUBJECTS = """photosynthesis|gravity|electricity|the water cycle|a rainbow|the solar system|the heart|a volcano|an
earthquake|the internet|a computer|a telephone|an airplane|a steam engine|democracy|a bank|a law|a vote|a market|a
battery|a magnet|sound|light|heat|energy|an atom|evaporation|a cell|the brain|the lungs|bones|vitamins|a vaccine|sleep
|time|a calendar|a map|a compass|a clock|the seasons|the tides|a desert|a rain forest|a glacier|climate|recycling|a
food chain|migration|evolution|a fossil|a dinosaur|the sun|the moon|a planet|a comet|a telescope|a microscope|a
thermometer|a bridge|a dam|a lighthouse|printing|writing|money|trade|friendship|honesty|courage|kindness|patience
|history|art|music|poetry|a symphony|a fraction|zero|a triangle|probability|an algorithm|a robot|a program""".replace(
    "\n", ""
).split("|")
FACTS = """the capital of {country}|the color of {thing}|a language people speak in {country}|a famous food of
{country}|a famous city in {country}|the weather in {country}""".replace("\n", " ").split("|")
COUNTRIES = """France Germany Italy Spain Portugal England Ireland Greece Turkey Egypt Kenya Nigeria India China Japan
Korea Thailand Australia Canada Mexico Brazil Argentina Chile Peru Norway Sweden Finland Poland Russia Austria
Switzerland Belgium Denmark Iceland Morocco Cuba Vietnam Indonesia""".split()
OPENERS = """Hello! How are you?|Good morning!|Hi there.|Hello, my name is {name}.|I am {feeling} today.|What should I
do today?|Can you help me?|Tell me something interesting.|I had a {feeling} day.|Do you like {thing}s?|I cannot
sleep.|I lost my {thing}.|My friend {name} is {feeling}.|I want to learn something new.|Tell me about {place}s.|What
is your favorite season?|I am going to the {place} tomorrow.|My {animal} is {feeling}.|Thank you for your help.|I need
a gift for {name}.|It is raining today.|What can I cook tonight?|I feel {feeling}. What can I do?""".replace(
    "\n", " "
).split("|")
SIMPLE = [
    "Use simple words and short sentences.",
    "Use simple words.",
    "Write in clear, simple English.",
    "Keep it short and simple.",
    "Write it for a young child.",
]
BRIEF = [
    "Answer in two or three simple sentences.",
    "Answer in a few simple sentences.",
    "Keep the answer short.",
    "Give a short, simple answer.",
    "Answer in one short paragraph.",
    "Use simple words.",
]

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # what SmolLM2 was tuned with
REPEAT_PENALTY = 1.15
FUNCTION_WORDS = set(
    """the a an and or but so to of in on at by for with from as is was were are be been it its he she
they his her their him them you your i my me we our us that this had has have not no do did said there then when what
who which would could can will up out into one all if""".split()
)


def wordnet_words(folder: Path) -> dict[str, list[str]]:
    """Common concrete nouns, verbs and adjectives by how often WordNet's corpora tag them."""
    counts: dict[str, Counter] = {"noun": Counter(), "verb": Counter(), "adjective": Counter()}
    concrete = {"05", "06", "08", "13", "17", "18", "20", "26", "15", "12", "04"}
    for line in (folder / "index.sense").read_text().splitlines():
        key, _, _, tagged = line.split()
        lemma, rest = key.split("%")
        kind, lexfile = rest.split(":")[:2]
        if not lemma.isalpha() or len(lemma) < 3:
            continue
        if kind == "1" and lexfile in concrete:
            counts["noun"][lemma] += int(tagged)
        elif kind == "2":
            counts["verb"][lemma] += int(tagged)
        elif kind in "35":
            counts["adjective"][lemma] += int(tagged)
    take = {"noun": 2500, "verb": 900, "adjective": 700}
    return {kind: [w for w, n in counter.most_common(take[kind]) if n] for kind, counter in counts.items()}


def article(phrase: str) -> str:
    """phrase with "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


class PromptWriter:
    """Draws prompts: (kind, what the user asks, the hidden instruction after it)."""

    def __init__(self, words: dict[str, list[str]], seed: int):
        self.words, self.random = words, random.Random(seed)

    def pick(self, items: list[str]) -> str:
        """One item, underscores as spaces."""
        return self.random.choice(items).replace("_", " ").strip()

    def fill(self, template: str) -> str:
        """template with its {slots} filled."""
        return template.format(
            name=self.pick(NAMES),
            feeling=self.pick(FEELINGS),
            thing=self.pick(THINGS),
            place=self.pick(PLACES),
            animal=self.pick(ANIMALS),
            country=self.pick(COUNTRIES),
        )

    def story(self) -> tuple[str, str, str]:
        """A request for a short story with a hero, and often an event, a place or required words."""
        hero = article(f"{self.pick(TRAITS)} {self.pick(self.random.choice([ANIMALS, ANIMALS, PEOPLE]))}")
        if self.random.random() < 0.5:
            hero += f" named {self.pick(NAMES)}"
        twist = self.random.choice(
            [
                "",
                f" who {self.pick(EVENTS)}",
                f" and {article(self.pick(THINGS))}",
                f" in {article(self.pick(PLACES))}",
                f" who {self.pick(EVENTS)}",
            ]
        )
        ask = self.random.choice(
            [
                "Write a short story about {}.",
                "Tell me a story about {}.",
                "Write a story about {}.",
                "Tell me a short story about {}.",
                "Please tell a bedtime story about {}.",
            ]
        )
        hidden = self.pick(SIMPLE)
        if self.random.random() < 0.6:
            three = (
                self.pick(self.words["noun"][:1200]),
                self.pick(self.words["verb"][:600]),
                self.pick(self.words["adjective"][:500]),
            )
            hidden += " Use the words {}, {} and {}.".format(*three)
        if self.random.random() < 0.25:
            hidden += " " + self.pick(
                [
                    "Include some dialogue.",
                    "Give it a happy ending.",
                    "End with a lesson.",
                    "Let something unexpected happen.",
                ]
            )
        return "story", ask.format(hero + twist), hidden

    def explain(self) -> tuple[str, str, str]:
        """What is X, why is X, how does X work."""
        noun, subject = article(self.pick(self.words["noun"])), self.pick(SUBJECTS)
        ask = self.random.choice(
            [
                f"What is {noun}?",
                f"What is {noun}?",
                f"What is {noun} used for?",
                f"Tell me about {subject}.",
                f"Explain {subject} in simple words.",
                f"What is {subject}?",
                f"How does {subject} work?",
                f"Why {self.pick(WHY)}?",
                f"Why {self.pick(WHY)}?",
                f"What is {self.fill(self.pick(FACTS))}?",
                f"What does the word {self.pick(self.words['verb'])} mean?",
                f"What does the word {self.pick(self.words['adjective'])} mean?",
                f"What is the difference between {noun} and {article(self.pick(self.words['noun']))}?",
            ]
        )
        return "explain", ask, self.pick(BRIEF)

    def advice(self) -> tuple[str, str, str]:
        """How can I ..."""
        skill = self.pick(SKILLS)
        ask = self.random.choice(
            [
                f"How can I {skill}?",
                f"How do I {skill}?",
                f"Give me some tips to {skill}.",
                f"What is the best way to {skill}?",
                f"Why should I {skill}?",
            ]
        )
        return "advice", ask, self.pick(BRIEF)

    def describe(self) -> tuple[str, str, str]:
        """Describe a place, a person or a thing."""
        trait = self.pick(self.words["adjective"][:400])
        what = self.random.choice(
            [
                f"{trait} {self.pick(PLACES)}",
                f"{self.pick(TRAITS)} {self.pick(PEOPLE)}",
                f"{trait} {self.pick(THINGS)}",
                self.pick(self.words["noun"][:1500]),
            ]
        )
        ask = self.random.choice(
            [
                f"Describe {article(what)}.",
                f"Write a few sentences about {article(what)}.",
                f"Write a short paragraph about {article(what)}.",
            ]
        )
        return "describe", ask, self.pick(SIMPLE)

    def dialogue(self) -> tuple[str, str, str]:
        """A short conversation between two named people."""
        a, b = self.random.sample(NAMES, 2)
        about = self.random.choice(
            [
                self.pick(TOPICS),
                article(self.pick(self.words["noun"][:1000])),
                f"{article(self.pick(PEOPLE))} who {self.pick(EVENTS)}",
            ]
        )
        return "dialogue", f"Write a short conversation between {a} and {b} about {about}.", self.pick(SIMPLE)

    def talk(self) -> tuple[str, str, str]:
        """Small talk."""
        ask = self.fill(self.pick(OPENERS))
        if self.random.random() < 0.4:
            ask += " " + self.fill(self.pick(OPENERS))
        return "talk", ask, self.random.choice(["", "", "Answer in one or two friendly sentences."])

    def draw(self) -> tuple[str, str, str]:
        """One prompt; stories are nearly half, explanations a quarter."""
        makers = [self.story, self.explain, self.advice, self.describe, self.dialogue, self.talk]
        return self.random.choices(makers, weights=[46, 25, 8, 10, 8, 3])[0]()


def repeat_penalties(tokenizer) -> np.ndarray:
    """Per token [V], what its logit is divided by once a document has it: only content words and word pieces pay."""
    penalties = np.full(len(tokenizer), REPEAT_PENALTY, np.float32)
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token]).strip().lower()
        if word in FUNCTION_WORDS or not any(c.isalpha() for c in word):
            penalties[token] = 1
    return penalties


def allowed_tokens(tokenizer, end: int) -> np.ndarray:
    """Additive mask [V]: 0 for printable ASCII and the end mark, -inf for the rest."""
    mask = np.full(len(tokenizer), -np.inf, np.float32)
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if token > 16 and text and all(c == "\n" or " " <= c <= "~" for c in text) and "<|" not in text:
            mask[token] = 0
    mask[end] = 0
    return mask


def main() -> None:
    """Write the prompts."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--count", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    writer = PromptWriter(wordnet_words(args.wordnet), args.seed)
    drawn = [writer.draw() for _ in range(args.count)]
    head = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    texts = [f"{head}{ask} {hidden}".rstrip() + "<|im_end|>\n<|im_start|>assistant\n" for _, ask, hidden in drawn]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = np.zeros((len(ids), max(map(len, ids))), np.uint16)
    for row, line in enumerate(ids):
        tokens[row, : len(line)] = line
    temperatures = np.random.default_rng(args.seed).choice([0.7, 0.8, 0.9, 1.0], len(ids)).astype(np.float32)
    np.savez_compressed(
        args.out,
        tokens=tokens,
        lengths=np.array([len(x) for x in ids], np.int16),
        temperatures=temperatures,
        penalties=repeat_penalties(tokenizer),
        allowed=allowed_tokens(tokenizer, tokenizer.eos_token_id),
    )
    with args.text.open("w") as file:
        for kind, ask, _ in drawn:
            file.write(json.dumps({"kind": kind, "ask": ask}) + "\n")


if __name__ == "__main__":
    main()
