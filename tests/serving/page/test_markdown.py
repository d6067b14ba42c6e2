"""The page's Markdown, as HTML that the browser would have had to be told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from serving.conftest import RunningServer

SHOW = """async (texts) => {
    const { showMarkdown } = await import("/page/markdown.js");
    const target = document.createElement("div");
    for (const text of texts) showMarkdown(target, text);
    return target.innerHTML;
}"""


@pytest.fixture(scope="module")
def tab(browser: Browser, server: RunningServer) -> Iterator[Page]:
    """One page for all tests: they change nothing about it."""
    with browser.new_page() as page:
        page.goto(server.url)
        yield page


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("# One #\ntext", "<h3>One</h3><p>text</p>"),
        ("**a** *b* __c__ _d_ ~~e~~ `f`", "<p><strong>a</strong> <em>b</em> <strong>c</strong> <em>d</em> "
         "<del>e</del> <code>f</code></p>"),
        ("***a** b*", "<p><em><strong>a</strong> b</em></p>"),
        ("***a***", "<p><em><strong>a</strong></em></p>"),
        ("**a *b***", "<p><strong>a <em>b</em></strong></p>"),
        ("**a *b** c", "<p><strong>a *b</strong> c</p>"),
        ("2 * 3 * 4, snake_case_name, **open", "<p>2 * 3 * 4, snake_case_name, **open</p>"),
        (r"\*a\* \_ `\*`", r"<p>*a* _ <code>\*</code></p>"),
        ("`` a`b `` and ` open", "<p><code>a`b</code> and ` open</p>"),
        ("a &amp; <b>b</b>", "<p>a &amp;amp; &lt;b&gt;b&lt;/b&gt;</p>"),
        ("> a\n> - b\nc", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>"),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        ("So:\n- a\n- b\n  - c\n  - d\n- e", "<p>So:</p><ul><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li>"
         "<li>e</li></ul>"),
        ("3. a\n\n   more\n4. b\n\nend", '<ol start="3"><li>a<p>more</p></li><li>b</li></ol><p>end</p>'),
        ("1. a\n   - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
        ("1. a\n  - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
        ("- a\n1. b", "<ul><li>a</li></ul><ol><li>b</li></ol>"),
        ("  - a\n  - b", "<ul><li>a</li><li>b</li></ul>"),
        ("[a](https://b.c/d_(e)) https://f.g/h.", '<p><a href="https://b.c/d_(e)" target="_blank" rel="noopener '
         'noreferrer">a</a> <a href="https://f.g/h" target="_blank" rel="noopener noreferrer">https://f.g/h</a>.</p>'),
        ("[a](javascript:b) [c](data:d) [e](/f)", "<p>[a](javascript:b) [c](data:d) [e](/f)</p>"),
        ("![a](https://b.c/d.png)", '<p>!<a href="https://b.c/d.png" target="_blank" rel="noopener '
         'noreferrer">a</a></p>'),
        ("|a|b|\n|-|-:|\n|1|2|\n|3|", '<div class="table" tabindex="0"><table><thead><tr><th class="start">a</th>'
         '<th class="end">b</th></tr></thead><tbody><tr><td class="start">1</td><td class="end">2</td></tr>'
         '<tr><td class="start">3</td><td class="end"></td></tr></tbody></table></div>'),
        ("a | b", "<p>a | b</p>"),
    ],
)  # fmt: skip
def test_markdown(tab: Page, text: str, html: str) -> None:
    assert tab.evaluate(SHOW, [text]) == html


@pytest.mark.parametrize("fence", ["```", "~~~~"])
@pytest.mark.parametrize("is_closed", [False, True])
def test_code_stays_as_it_is(tab: Page, fence: str, is_closed: bool) -> None:
    code = "# no heading\n\n  *a*\n``"
    text = f"{fence}python\n{code}" + (f"\n{fence}\nend" if is_closed else "")
    html = tab.evaluate(SHOW, [text])
    assert f'<pre tabindex="0"><code>{code}</code></pre>' in html and "<span>python</span>" in html
    assert ("<p>end</p>" in html) == is_closed


ALL_KINDS = "# a\n\nb *c* `d`\n- e\n  - f\n\n> g\n\n|h|i|\n|-|-|\n|j|k|\n\n```l\nm\n```\n***\nn [o](https://p.q)"


def test_a_text_that_grows_is_shown_as_the_whole(tab: Page) -> None:
    growing = [ALL_KINDS[:length] for length in range(len(ALL_KINDS) + 1)]
    assert tab.evaluate(SHOW, growing) == tab.evaluate(SHOW, [ALL_KINDS])


def test_shown_blocks_stay(tab: Page) -> None:
    """So that someone can select text of an answer that grows."""
    stays = tab.evaluate("""async () => {
        const { showMarkdown } = await import("/page/markdown.js");
        const target = document.createElement("div");
        showMarkdown(target, "one\\n\\ntwo");
        const [one, two] = target.childNodes;
        showMarkdown(target, "one\\n\\ntwo and more");
        return [target.childNodes[0] === one, target.childNodes[1] === two];
    }""")
    assert stays == [True, False]


@pytest.mark.parametrize("part", ["*", "_a", "`", "[", "> ", "- ", "**a ", "|", "[a](", "~~a", "\\", "  - a\n", "`a``"])
def test_hostile_texts(tab: Page, part: str) -> None:
    """Deep nesting overflows no stack, and nothing takes quadratic time: that would exceed the browser's limit here."""
    assert tab.evaluate(SHOW, [part * 20_000])
