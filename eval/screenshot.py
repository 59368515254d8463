"""Takes a picture of a page with a headless Chromium, which must be installed.

python -m eval.screenshot out/demo/report.html eval/results/report.png
python -m eval.screenshot out/demo/report.html dark.png --dark --size 1080x1600
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.browser import QUIET, find_browser


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--size", default="1080x1300", metavar="WIDTHxHEIGHT")
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    browser = find_browser()
    if browser is None:
        sys.exit("no Chromium is installed")
    with TemporaryDirectory() as profile:
        command = [browser, *QUIET, f"--user-data-dir={profile}", "--hide-scrollbars"]
        command += [
            f"--window-size={arguments.size.replace('x', ',')}",
            f"--screenshot={arguments.picture.resolve()}",
        ]
        command += [f"--blink-settings=preferredColorScheme={0 if arguments.dark else 1}"]
        subprocess.run(
            [*command, arguments.page.resolve().as_uri()], check=True, capture_output=True, timeout=60
        )


if __name__ == "__main__":
    main()
