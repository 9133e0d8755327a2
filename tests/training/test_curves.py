import json

import pytest

from popi.training.curves import draw_curves, running_mean


def test_the_running_mean_by_hand():
    assert running_mean([2.0, 4.0, 9.0, 1.0], 2) == [2.0, 3.0, 6.5, 5.0]


def test_the_curves_are_a_picture_whatever_was_measured(tmp_path):
    pytest.importorskip("matplotlib", reason="curves need the extra train")
    lines = [
        {"step": step, "reward": -7 + step / 10, "kl": None, "held_out": {"accuracy": 0.5 + step / 100}}
        for step in range(1, 20)
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(metrics, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
