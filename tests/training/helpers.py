"""What several tests of training need."""

from popi.engine.chat_tokens import ChatTokens
from popi.engine.checks import verify
from popi.prompts import DEFAULT
from popi.summary import Author, PreferenceSummary, Provenance
from popi.training.scoring import PairScorer
from popi_generators.prompted import QuotedSummary


def summary(text, user_id="ann"):
    return PreferenceSummary(user_id=user_id, text=text, provenance=Provenance(author=Author.INFERRED))


def answer_format(limit=4096, prompts=DEFAULT):
    return QuotedSummary(len, limit=limit, prompts=prompts)


def scorer_of(model, tokenizer, *, format=None, **options):
    tokens = ChatTokens(tokenizer, "tiny")
    abilities = verify(model, tokens, "tiny")
    return PairScorer(model, tokens, format or answer_format(), abilities=abilities, **options)
