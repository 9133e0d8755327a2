from __future__ import annotations

import pytest

from popi.backends.base import ChatResult
from popi.errors import BackendError
from popi.response import Response, incompleteness, read_response, response_or_raise
from popi.roles import Failure


def test_a_result_becomes_a_response_with_all_its_figures() -> None:
    result = ChatResult("text", "length", 10, 5, "m", route="r")
    response = read_response(result, "ann")
    assert response == Response("text", "length", 10, 5, "m", "r")
    assert (str(response), response.is_complete) == ("text", False)


def test_an_empty_refusal_is_a_failure_and_one_in_words_is_not() -> None:
    refusal = ChatResult("", "refused", error="the model refused: no")
    assert read_response(refusal, None) == Failure("", "the model refused: no", "empty")
    said = read_response(ChatResult("I cannot.", "refused", error="the model refused: no"), "ann")
    assert isinstance(said, Response)
    assert incompleteness(said) == "the model refused"


def test_an_incomplete_response_is_an_error_only_where_it_must_be_complete() -> None:
    response = Response("text", "filtered", 10, 5, "m")
    assert response_or_raise(response, "ann", require_complete=False) is response
    with pytest.raises(BackendError, match="is incomplete: a content filter removed a part of it"):
        response_or_raise(response, "ann", require_complete=True)
