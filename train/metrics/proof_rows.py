"""What prove.json says, for the report. Imports no torch."""

from pathlib import Path

from conf.files import read_plain_json

PROOF_FILE, PROOF_CARD_FILE = "prove.json", "card.md"
"""Every figure; and what of it a reader of the run has to know."""


def report_rows(run_folder: Path) -> tuple[str, list[tuple[str, ...]]] | None:
    """A sentence and a table for the report; None where there is no certificate that can be read."""
    try:
        record = read_plain_json(run_folder / PROOF_FILE)
        verb = "trains" if record["holds"] else "does not train"
        sentence = f"mode=prove: {record['layout']} {verb} this model, in miniature on {record['ranks']} ranks."
        if first := record["first_difference"]:
            place = f"{first['quantity']} of {first['name']} in pass {first['proof']}, step {first['step']}"
            sentence += f" The first difference: {first['phase']}, {place}."
        rows: list[tuple[str, ...]] = [
            (
                each["proof"],
                each["quantity"],
                "failed" if each["failed"] else "holds",
                "not a number" if each["worst"] is None else f"{each['worst']:.2g}",
                f"{each['bound']:.2g}",
                each["reason"],
            )
            for each in record["quantities"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sentence, rows
