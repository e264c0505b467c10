"""Pictures of a report for docs/: `python -m tests.screenshots results docs`."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from browser import browser, open_page, wait_for_charts

from analysis.report.page import Request, report

VIEWS = {
    "light": {"viewport": {"width": 1180, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1180, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "device_scale_factor": 2},
}


def main(results: Path, target: Path, whole: bool) -> None:
    """Write report_<view>.png for each view, and latents.png where the best cell stored contexts."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        file = Path(folder) / "report.html"
        for name, request in (("report", Request()), ("latents", Request(latents_of="best"))):
            file.write_text(report(results, request)[0], encoding="utf-8")
            for view, options in VIEWS.items():
                with open_page(chromium, file, **options) as (page, wrong):
                    wait_for_charts(page)
                    page.screenshot(path=target / f"{name}_{view}.png", full_page=whole)
                    print(target / f"{name}_{view}.png", *wrong)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), whole="--whole" in sys.argv)
