"""The last screens: complete, copyable at any width, and harmless whatever text the model wrote."""

import io
from pathlib import Path

from rich.console import Console

from train.show.screens import Progress, final_screen, show_rows, stopped_screen


def console(width: int = 40, **more) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False, **more)


def test_final_screen_names_everything_and_breaks_no_path():
    folder = Path("/a/long/folder/that/is/wider/than/the/window/runs/tiny")
    screen = console()
    final_screen(
        "tiny",
        300,
        seconds=125.0,
        training_loss=5.125,
        validation_loss=5.25,
        bits_per_byte=2.5,
        sample="def [bold]x[/bold]:\n\x1b[2Jpass",
        checkpoint=folder / "checkpoints/step_300",
        report=folder / "report.html",
        wandb=str(folder / "wandb/offline-run-1"),
        console=screen,
    )
    shown = screen.file.getvalue()
    assert (
        "tiny: 300 steps complete in 2:05" in shown
        and "loss 5.1250" in shown
        and "5.2500" in shown
        and "2.5000 bits per byte" in shown
    )
    assert f"{folder}/checkpoints/step_300\n" in shown and f"{folder}/report.html  " in shown
    assert f"wandb sync {folder}/wandb/offline-run-1\n" in shown
    assert "| def [bold]x[/bold]:\n" in shown and "\x1b" not in shown


def test_an_ascii_terminal_shows_question_marks():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    final_screen("tiny", 1, sample="na\u00efve \x07", console=Console(file=stream, width=40))
    stream.flush()
    assert b"| na?ve ?" in stream.buffer.getvalue()


def test_titles_and_notes_break_between_words_in_a_narrow_terminal():
    screen = Console(width=60, force_terminal=True, color_system=None, record=True)
    sentence = "the base of MFU is 1.61 TFLOP/s per rank: best GEMM so far, stored in a file of the folder of peaks"
    show_rows(screen, sentence, "green", [("Files", sentence)])
    Progress("a", 3, enabled=False, console=screen).note(sentence)
    lines = [line.rstrip() for line in screen.export_text().splitlines()]
    assert max(map(len, lines)) <= 60 and " ".join(" ".join(lines).split()).count(sentence) == 3


def test_final_screen_leaves_out_what_there_is_not():
    screen = console()
    final_screen("tiny", 1, console=screen)
    assert screen.file.getvalue().strip() == "tiny: 1 steps complete"


def test_stopped_screen_says_how_to_go_on():
    screen = console()
    command = "python -m train conf=tiny name=a_long_name_for_this_run"
    stopped_screen(
        "tiny", 7, 300, "SIGTERM", checkpoint=Path("runs/tiny/checkpoints/step_7"), command=command, console=screen
    )
    shown = screen.file.getvalue()
    assert "stopped at step 7 of 300" in shown and command in shown and "SIGTERM" in shown
