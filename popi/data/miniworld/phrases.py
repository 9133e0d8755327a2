"""The words of the mini world: how each side of a dimension is written, claimed, praised and requested."""

from __future__ import annotations

from dataclasses import dataclass

from popi.data.miniworld.tastes import DIMENSIONS, SIDES


@dataclass(frozen=True, slots=True)
class Wording:
    """How people talk about one side of one dimension.

    Attributes:
        names: Names of the side, in summaries and statements.
        praise: Comments of a user who likes the side on an answer that has it.
        complaint: Comments of a user who likes the side on an answer that lacks it.
        request: Requests to an assistant.
        trade: An occupation whose members tend to like the side.
    """

    names: tuple[str, ...]
    praise: tuple[str, ...]
    complaint: tuple[str, ...]
    request: tuple[str, ...]
    trade: str


def _wording(names: str, praise: str, complaint: str, request: str, trade: str) -> Wording:
    options = [tuple(text.split("|")) for text in (names, praise, complaint, request)]
    return Wording(options[0], options[1], options[2], options[3], trade)


WORDING: dict[tuple[str, str], Wording] = {
    ("opening", "greeting"): _wording(
        "a warm greeting|a friendly hello",
        "Nice of you to say hello.|The welcome made my day.",
        "Not even a hello?|You could greet me first.",
        "Could you greet me first?|Say hello before you start.",
        "waiter",
    ),
    ("opening", "direct"): _wording(
        "no greeting|a direct start",
        "You got to the point at once.|Good, no small talk.",
        "Skip the small talk.|I do not need a hello.",
        "Could you skip the hello?|Start with the answer.",
        "surgeon",
    ),
    ("emoji", "emoji"): _wording(
        "emoji|little pictures",
        "That tiny picture is cute.|The emoji cheered me up.",
        "It looks bare without emoji.|Where are the emoji?",
        "Could you add an emoji?|Put in a small picture.",
        "florist",
    ),
    ("emoji", "plain"): _wording(
        "no emoji|plain text only",
        "Good, only words.|Glad there are no silly pictures.",
        "Those pictures are silly.|Please spare me the emoji.",
        "Could you leave out the emoji?|Only words, please.",
        "judge",
    ),
    ("format", "bullets"): _wording(
        "bullet points|lists",
        "The list is easy to scan.|Great bullets.",
        "I would rather see a list.|This should be bullets.",
        "Could you make it a list?|Bullets, please.",
        "manager",
    ),
    ("format", "prose"): _wording(
        "flowing prose|full paragraphs",
        "It reads like a proper paragraph.|Lovely flow.",
        "Those bullets are choppy.|A paragraph would read better.",
        "Could you write it as a paragraph?|No bullets, please.",
        "novelist",
    ),
    ("stance", "confident"): _wording(
        "confident advice|firm answers",
        "I like how sure you are.|Nice and firm.",
        "Stop dithering.|You sound unsure.",
        "Could you be more sure?|Commit to an answer.",
        "pilot",
    ),
    ("stance", "hedged"): _wording(
        "careful advice|cautious answers",
        "Good that you admit doubt.|Nicely careful.",
        "You sound too sure.|Nothing is that certain.",
        "Could you be more careful?|Admit some doubt.",
        "scientist",
    ),
    ("tone", "casual"): _wording(
        "a casual tone|relaxed talk",
        "You talk like a friend.|So relaxed.",
        "That is stiff.|You sound like a butler.",
        "Could you loosen up?|Talk like a friend.",
        "surfer",
    ),
    ("tone", "formal"): _wording(
        "a formal tone|polite language",
        "Very courteous.|How well mannered.",
        "That is too chummy.|We are not buddies.",
        "Could you be more polite?|Mind your manners.",
        "diplomat",
    ),
    ("level", "simple"): _wording(
        "simple words|everyday words",
        "Even I understood it.|So easy to read.",
        "Those are hard words.|I had to look words up.",
        "Could you use easier words?|Say it so a child gets it.",
        "farmer",
    ),
    ("level", "technical"): _wording(
        "technical words|expert terms",
        "Finally an expert's vocabulary.|Very precise wording.",
        "That wording is childish.|I know the proper terms.",
        "Could you use the proper terms?|Write as for an expert.",
        "engineer",
    ),
    ("units", "metric"): _wording(
        "metric units|centimetres and kilos",
        "Good, units I can measure.|The metric numbers helped.",
        "I cannot read inches.|Pounds mean nothing to me.",
        "Could you use metric?|Give me centimetres.",
        "chemist",
    ),
    ("units", "imperial"): _wording(
        "imperial units|inches and pounds",
        "Good, the units I grew up with.|The inches helped.",
        "I cannot read centimetres.|Kilos mean nothing to me.",
        "Could you use imperial?|Give me inches.",
        "cowboy",
    ),
    ("length", "long"): _wording(
        "long answers|full detail",
        "So thorough.|You covered everything.",
        "That is too short.|I wanted more.",
        "Could you go into detail?|Tell me more.",
        "historian",
    ),
    ("length", "short"): _wording(
        "short answers|brief replies",
        "Nice and brief.|I read it in a second.",
        "That is too long.|You go on and on.",
        "Could you cut it down?|Be brief.",
        "courier",
    ),
    ("examples", "example"): _wording(
        "examples|concrete cases",
        "The example made it clear.|Good case.",
        "An example would help.|Too abstract for me.",
        "Could you give an example?|Show me a case.",
        "teacher",
    ),
    ("examples", "abstract"): _wording(
        "no examples|rules alone",
        "Good, no cases to wade through.|The bare rule is enough.",
        "The example is a waste.|I did not ask for a case.",
        "Could you drop the example?|Just the rule.",
        "philosopher",
    ),
    ("closing", "question"): _wording(
        "a closing question|being asked back",
        "I like that you asked back.|Good question at the end.",
        "You never ask me back.|It ends too suddenly.",
        "Could you ask me something back?|End with a question.",
        "therapist",
    ),
    ("closing", "stop"): _wording(
        "no closing question|a clean ending",
        "Good, you just stopped.|The ending is clean.",
        "Stop asking me back.|I hate that last question.",
        "Could you not ask me back?|End without a question.",
        "soldier",
    ),
}
"""Every (dimension, side)."""

VAGUE = {
    "opening": "how an answer begins",
    "emoji": "how an answer looks",
    "format": "the layout of the text",
    "stance": "how sure an answer is",
    "tone": "the tone of voice",
    "level": "the choice of words",
    "units": "how sizes are given",
    "length": "the size of an answer",
    "examples": "how things are explained",
    "closing": "how an answer ends",
}
"""Claims of a vague writer, which name a dimension but not the side."""

STATEMENTS = ("I like {}.", "Give me {}.", "For me it has to be {}.", "I always want {}.")

GREETINGS = ("Hello!", "Hi there!", "Welcome!", "Good day!")
EMOJI = ("\U0001f600", "\U0001f44d", "\u2728", "\U0001f680", "\U0001f389", "\U0001f31f")
STANCES = {
    "confident": ("Definitely", "Certainly", "Surely", "Clearly"),
    "hedged": ("Perhaps", "Maybe", "Possibly", "Probably"),
}
TONES = {
    "casual": ("just", "simply go and", "totally"),
    "formal": ("kindly", "one should", "please do"),
}
VERBS = {
    "simple": ("use", "start", "check", "keep", "get", "fix", "grab", "mind", "mix", "show"),
    "technical": (
        "utilise", "initiate", "verify", "maintain", "procure", "rectify", "select", "monitor", "combine", "exhibit",
    ),
}  # fmt: skip
UNITS = {
    "metric": ("cm", "kilos", "metres", "litres"),
    "imperial": ("inches", "pounds", "yards", "gallons"),
}
QUANTITIES = ("within {} {}", "at {} {}", "near {} {}", "up to {} {}")
EXAMPLES = ("For example, take the {}.", "For instance, think of the {}.", "An example is the {}.")
QUESTIONS = ("Shall I go on?", "Does that help?", "What do you think?", "Want to know more?")

PROMPTS = (
    "How do I handle the {thing} in {topic}?",
    "What should I know about the {thing} in {topic}?",
    "Any tips on {topic}, mostly the {thing}?",
    "My {thing} gives me trouble in {topic}. What now?",
    "Tell me about the {thing} for {topic}.",
    "I am new to {topic}. What about the {thing}?",
    "Why does the {thing} matter in {topic}?",
    "What is the best {thing} for {topic}?",
    "In {topic}, what do I do with the {thing} and the {other}?",
    "Explain the {thing} and the {other} in {topic}.",
    "Which comes first in {topic}, the {thing} or the {other}?",
    "Help me with {topic}: the {thing} worries me.",
)


def wording(dimension: int, side: int) -> Wording:
    """The words for a side (+1 the first, -1 the second) of the dimension with this index."""
    name = DIMENSIONS[dimension]
    return WORDING[name, SIDES[name][0 if side > 0 else 1]]
