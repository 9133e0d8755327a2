from __future__ import annotations

from pathlib import Path

import pytest

from popi.errors import BackendError
from popi.testing import vllm_server
from tests.servers import needs_vllm


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    needs_vllm()
    with pytest.raises(BackendError, match=r"did not start:(?s:.)*nowhere"), vllm_server("/nowhere", name="m"):
        pass
