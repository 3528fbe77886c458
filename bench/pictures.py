"""The two pictures of the README: the report of a run, and a plan of the 671B model on 2048 H800s. Needs chromium.

    python -m bench.pictures [RUN] [--out train/docs]

Writes plan.png, and report.png if RUN is given: the folder of a trained run, such as runs/tiny. The pages are the
program's own, with a wider grid for the pictures.

Takes about 30 seconds.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from conf.load import compose
from conf.schema import ROOT
from train.plan.budget import make_plan
from train.plan.report.plan_page import write_page
from train.plan.report.plan_record import plan_record
from train.show.report import write_report

DOCS = ROOT / "train" / "docs"
PLANNED = ("conf=deepseek_v3", "mode=plan")
"""Arguments of the command that the README shows beside the picture."""
WIDTH = 1500
MOST = 150_000
"""Maximum bytes of a picture, so that a clone stays small."""
GRID = """<style>
main { max-width: none; padding: 4px 20px; } h1 { margin: 4px 0 0; } h2 { display: none; } main > p:not(.sub), ul { display: none; }
h2 + p.sub { display: none; } .cards { grid-template-columns: repeat(6, 1fr); margin-bottom: 12px; } .card small { display: none; }
.figures { grid-template-columns: repeat(6, 1fr); } figure { grid-column: span 3; } figure.wide { grid-column: span 6; } figcaption { display: none; }
</style>"""
OF_REPORT = "", 1150, 0.7
"""For the report's page: styles in addition to GRID, height of the part in the picture, and scale of the picture."""
OF_PLAN = "<style>figure:nth-child(5) { display: none; }</style>", 1400, 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a run that has trained")
    parser.add_argument("--out", type=Path, default=DOCS, metavar="FOLDER")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "plan.html"
        plan = make_plan(compose(*PLANNED))
        write_page(page, plan, None, plan_record(plan, [], None))
        take(page, options.out / "plan.png", Path(folder), *OF_PLAN)
        if options.run:
            take(write_report(options.run), options.out / "report.png", Path(folder), *OF_REPORT)


def take(page: Path, picture: Path, folder: Path, style: str, height: int, scale: float) -> None:
    """Takes a picture of the upper part of a page. folder: for a copy of the page. style, height, scale: as in
    OF_REPORT."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("this needs chromium: apt-get install chromium")
    copy = folder / "copy.html"
    copy.write_text(page.read_text().replace("</head>", f"{GRID}{style}</head>", 1))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000"]
    flags += [
        f"--window-size={WIDTH},{height}",
        f"--force-device-scale-factor={scale}",
        f"--user-data-dir={folder}/profile",
    ]
    flags += ["--blink-settings=preferredColorScheme=1"]
    command = [chromium, *flags, f"--screenshot={picture}", copy.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    size = picture.stat().st_size
    print(f"{picture}: {size:,} bytes")
    if size > MOST:
        sys.exit(f"{picture.name} has more than {MOST:,} bytes: make it smaller (its height or scale)")


if __name__ == "__main__":
    main()
