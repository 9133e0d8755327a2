"""The reference of the preference objective: log-probabilities of all pairs on plain prompts, computed once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from popi.data.example import HeldOutPair
from popi.errors import InputError
from popi.io import read_json, write_text
from popi.training.ranks import ONE_RANK, Ranks
from popi.training.scoring import NO_REFERENCE, ConditionedPair, PairLogps, Scorer

log = logging.getLogger(__name__)


def reference_key(pair: HeldOutPair) -> str:
    """Identifies a pair by its content."""
    return hashlib.sha256(json.dumps([pair.prompt, pair.chosen, pair.rejected]).encode()).hexdigest()[:20]


class Reference:
    """log pi_ref(y_w|x) and log pi_ref(y_l|x) of every pair, computed once and stored in a file.

    The reference model answers the plain prompt, so training never changes these values.

    Args:
        logps: Log-probabilities by :func:`reference_key`.
    """

    def __init__(self, logps: dict[str, PairLogps]) -> None:
        self._logps = logps

    def __getitem__(self, pair: HeldOutPair) -> PairLogps:
        """The log-probabilities of a pair."""
        return self._logps[reference_key(pair)]

    @classmethod
    def of(
        cls,
        pairs: Sequence[HeldOutPair],
        scorer: Scorer,
        *,
        fingerprint: str,
        file: Path,
        batch: int = 512,
        ranks: Ranks = ONE_RANK,
    ) -> Reference:
        """Reads the file, or scores every pair and writes it. The ranks share the work.

        Args:
            pairs: All pairs of the run.
            scorer: Scores with the reference model.
            fingerprint: Fingerprint of the model's weights.
            file: The file.
            batch: Number of pairs of a rank in a batch.
            ranks: The ranks of the run.

        Raises:
            InputError: If the file is of another model, other templates or other pairs, or a pair cannot be scored.
        """
        wanted = {reference_key(pair): pair for pair in pairs}
        made_of = {
            "model": fingerprint,
            "template_hash": scorer.format.template_hash,
            "reduction": scorer.reduction,
            "pairs": hashlib.sha256("".join(sorted(wanted)).encode()).hexdigest()[:16],
        }
        if ranks.from_first(file.exists):
            return cls(_read(file, made_of))
        logps: dict[str, PairLogps] = {}
        names = list(wanted)
        log.info("reference: scoring %d pairs", len(names))
        for start in range(0, len(names), batch * ranks.count):
            part = names[start : start + batch * ranks.count]
            with ranks.alone():
                own = [ConditionedPair(None, wanted[name], NO_REFERENCE) for name in ranks.share(part)]
                ratios = scorer.ratios(own)
            values = list(map(PairLogps, ratios.chosen_N.tolist(), ratios.rejected_N.tolist()))
            logps |= zip(part, ranks.gather(values), strict=True)
            log.info("reference: scored %d of %d pairs", start + len(part), len(names))
        ranks.on_first(lambda: write_text(file, json.dumps({"made_of": made_of, "logps": logps}) + "\n"))
        return cls(logps)


def _read(file: Path, made_of: dict[str, str]) -> dict[str, PairLogps]:
    stored = read_json(file)
    for name, value in made_of.items():
        if not isinstance(stored, dict) or stored.get("made_of", {}).get(name) != value:
            fix = "restore the model, or choose another folder" if name == "model" else "remove it"
            raise InputError(f"was made with another {name.replace('_', ' ')}", file=file, fix=fix)
    return {name: PairLogps(*values) for name, values in stored["logps"].items()}
