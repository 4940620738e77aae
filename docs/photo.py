"""Writes pictures/page.png, a solved task's page: `python docs/photo.py BROWSER [CHECKPOINT]`.

BROWSER is the path of a Chromium; a checkpoint with both voices shows TRM's steps, too.
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

import arctrm

TASK, PICTURE = "arc1:4cd1b7b2", Path(__file__).parent / "pictures/page.png"

if __name__ == "__main__":
    solver = arctrm.Solver.from_pretrained(*sys.argv[2:])
    html = solver.solve(arctrm.load_task(TASK), budget="4m").to_html()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=sys.argv[1], args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 1310})
        page.set_content(html)
        page.screenshot(path=PICTURE)
        browser.close()
