"""card.md: the properties of a recipe that a proof has verified, on which device, and the properties that it has not.

It is for readers who get the run folder but do not see the screen.
"""

from collections.abc import Sequence
from pathlib import Path

from conf.files import atomic_write_text
from train.prove.certificate import PROOFS_SAY, Certificate, sharpness_of
from train.show.proof_rows import PROOF_CARD_FILE, PROOF_FILE

VERIFIED = {
    "forward": (
        ("start", "settings", "forward", "validation"),
        "outputs of all parts, chosen experts and losses equal the reference's",
    ),
    "pretraining": (
        ("settings", "backward", "reduction", "update"),
        "gradients, their sums over micro-batches and ranks, updates and balance biases equal the reference's",
    ),
    "resume": (("checkpoint",), "a checkpoint, read in another layout, is the saved state bit for bit, and trains on"),
}
"""Fields that a proof can verify, with the phases of a comparison that belong to each, and the verified statement."""
NOT_HERE = {
    "conversion": "a proof converts nothing; `mode=export` writes a Hugging Face folder, and `init_from` reads one",
    "speed": "a proof measures none; `python -m bench` and the metrics of a run do",
}
"""Fields that a proof does not verify, with other sources."""


def write_card(certificate: Certificate, folder: Path) -> Path:
    """Write card.md next to prove.json."""
    atomic_write_text(folder / PROOF_CARD_FILE, "\n".join(_card_lines(certificate)) + "\n")
    return folder / PROOF_CARD_FILE


def _card_lines(certificate: Certificate) -> Sequence[str]:
    device = f"on {certificate.ranks} ranks on {certificate.device}"
    fields = {name: f"not verified here: {where}" for name, where in NOT_HERE.items()}
    fields |= {name: _field(certificate, name, device) for name in VERIFIED}
    order = ("conversion", "forward", "pretraining", "resume", "speed")
    return [
        f"# {certificate.name}",
        "",
        f"Layout: {certificate.layout}. In miniature, {certificate.steps} steps: {' '.join(certificate.cuts)}",
        "",
        f"What acts on some steps or heads alone acted so often: {certificate.acted_text or 'nothing of it is in the recipe'}.",
        "",
        f"What mode=prove has verified; every figure is in `{PROOF_FILE}`.",
        "",
        "| what | verified |",
        "|---|---|",
        *(f"| {name} | {fields[name]} |" for name in order),
        "",
        "| check | compared | not detected |",
        "|---|---|---|",
        *(
            f"| {one.proof}: {PROOFS_SAY[one.proof]} | {one.text().removeprefix('compared ')} | {one.does_not_see} |"
            for one in sharpness_of(certificate.verdicts)
        ),
    ]


def _field(certificate: Certificate, name: str, device: str) -> str:
    phases, held = VERIFIED[name]
    for difference in certificate.differences:
        if difference.phase in phases or (name == "resume" and difference.part > 0):
            return f"FAILED {device}: {difference.text()}"
    if name == "resume" and not certificate.second_layout:
        return "not verified here: no part of the proof went on from a checkpoint"
    if not certificate.verdicts:
        return "not verified here: nothing was compared"
    more = f" ({certificate.second_layout})" if name == "resume" else ""
    return f"yes, {device}: {held}{more}"
