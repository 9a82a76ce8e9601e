"""The built site in a browser: light and dark, wide and narrow, the rest of the internet blocked.

Each test runs on what smalldocs makes, and on what Quarto makes where it is installed. A site that
is there already, named by MLCOURSE_SITE, is tested alone: `make test-slow` gives the one that
`make docs` has made, docs.yml the one that it uploads. Every page is opened once, and all that the
tests want to know of it is noted. axe sees so many pages, and cells of them, that every kind of
element is among them; MLCOURSE_AXE=all, in the weekly canary, has it look at everything.
"""
import base64
import functools
import io
import json
import os
import re
import shutil
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from mlcourse.course import MACHINERY, directive as says, lessons
from mlcourse.frontpage import figures, readme_text
from mlcourse.record import MIME
from mlcourse.site import SiteError, build, run_day

ROOT = Path(__file__).resolve().parent.parent
PHONE, DESK = dict(width=390, height=844), dict(width=1280, height=900)
GIVEN = os.environ.get("MLCOURSE_SITE")
slow = pytest.mark.slow


def engine_of(site: Path) -> str:
    "Which program made a site: each writes its name into its pages."
    return re.search(r'name="generator" content="([a-z]+)', (site/"index.html").read_text())[1]


def engines() -> list[str]:
    "What the tests run on."
    if GIVEN: return [engine_of(ROOT/GIVEN)]
    return ["smalldocs", *["quarto"] * bool(shutil.which("quarto"))]


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        "Keep the test's output clean."


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    "The last tiny run of the course, or a small one made here."
    run = ROOT/"_run/tiny"
    if not (run/"report.json").is_file():
        from mlcourse.run import run_course
        run = tmp_path_factory.mktemp("run")
        names = ("index", "lib/01_tier", "lib/03_record")
        run_course([ROOT/f"nbs/{name}.ipynb" for name in names], tier="tiny", out=run)
    return run


@pytest.fixture(scope="session")
def report(run_dir):
    return json.loads((run_dir/"report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session", params=engines())
def engine(request):
    return request.param


@pytest.fixture(scope="session")
def site(engine, run_dir, tmp_path_factory):
    "The site, built from the run, or the one that is given."
    if GIVEN: return ROOT/GIVEN
    folder = tmp_path_factory.mktemp("site")
    return build(run_dir, folder/"docs", folder/"stage", engine=engine)


@pytest.fixture(scope="session")
def pages(site):
    "Every page, as a path from the site's root, the front page first."
    found = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    return sorted(found, key=lambda p: p != "index.html")


@contextmanager
def serving(folder):
    "Serve a folder on loopback, and give its address."
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try: yield f"http://127.0.0.1:{httpd.server_address[1]}/"
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


@pytest.fixture(scope="session")
def server(site):
    with serving(site) as address: yield address


class Visitor:
    "A tab that may talk to the server alone, and remembers what went wrong."

    def __init__(self, chromium, server, **options):
        self.context = chromium.new_context(**options)
        self.context.set_default_timeout(15_000)
        self.context.route("**/*", self._gate)
        self.server, self.outside, self.errors = server, [], []
        self.page = self.context.new_page()
        self.page.on("pageerror", self._note)
        self.page.on("console", lambda m: self._note(m.text) if m.type == "error" else None)
        self.page.on("response", lambda r: self._note(r.status) if r.status >= 400 else None)

    def _note(self, error): self.errors.append(f"{self.page.url}: {error}")

    def _gate(self, route):
        url = route.request.url
        if url.startswith((self.server, "data:", "blob:")): return route.continue_()
        self.outside.append(url)
        route.abort()

    def open(self, path):
        self.page.goto(self.server + path, wait_until="load")
        return self.page


KIND = r"e => [e.tagName, ...e.classList].sort().join('.').replace(/\d+/g, '')"
NOTES = r"""() => {
    const all = (s, root) => [...(root || document).querySelectorAll(s)];
    const start = e => e.outerHTML.slice(0, 90), main = document.querySelector('main');
    const named = e => (e.getAttribute('alt') || e.getAttribute('aria-label') || '').trim();
    const longest = e => Math.max(...e.innerText.split('\n').map(line => line.length));
    const boxOf = e => {   // what scrolls it
        while ((e = e.parentElement) !== main)
            if (['auto', 'scroll'].includes(getComputedStyle(e).overflowX)) return e; };
    const wider = e => e && e.scrollWidth > e.clientWidth + 1;
    const edge = main.getBoundingClientRect().right + 1;
    const tables = all('table', main).filter(e => e.getClientRects().length);
    return {
        text: main.textContent,
        page: document.body.innerText,
        bare: all('img, main svg:not([aria-hidden=true])').filter(e => !named(e)).map(start),
        hidden: all('pre.cell-code').filter(e => wider(e) && longest(e) <= 100).map(start),
        lost: tables.filter(e => e.getBoundingClientRect().right > edge && !boxOf(e)).map(start),
        cut: tables.filter(e => wider(boxOf(e))).map(start),
        bars: all('td code', main).filter(e => e.textContent.includes('\\|')).map(start),
        captions: all('figcaption').map(e => e.innerText.trim())
            .filter(text => /^Figure\s*\d+:?$/.test(text)),
        folds: all('details.code-fold')
            .map(e => [e.querySelector('summary').textContent.trim(), e.open]),
        know: all('details.how-we-know').map(e => e.open),
        links: all('#quarto-sidebar a[href]').map(e => e.href.split('#')[0]),
        visible: all('#quarto-sidebar .sidebar-link').filter(e => e.getClientRects().length).length,
        size: all('body *').length,
        kinds: [...new Set(all('body *').map(KIND))],
    }; }""".replace("KIND", KIND)


@dataclass
class Tour:
    "What was seen on every page, and what went wrong on the way."
    pages: dict[str, dict]
    errors: list[str]
    outside: list[str]

    def all(self, key):
        "Every finding of a kind, with its page."
        return [f"{path}: {found}" for path, notes in self.pages.items() for found in notes[key]]


@pytest.fixture(scope="module")
def tour(chromium, server, pages):
    "Open every page once, at 1,280 pixels and then as a phone."
    v, seen = Visitor(chromium, server, viewport=DESK, color_scheme="light"), {}
    for path in pages:
        page = v.open(path)
        page.set_viewport_size(DESK)
        seen[path] = page.evaluate(NOTES)
        page.set_viewport_size(PHONE)
        seen[path]["phone"] = page.evaluate("document.scrollingElement.scrollWidth")
    v.context.close()
    return Tour(seen, v.errors, v.outside)


@pytest.fixture
def visit(chromium, server):
    "Make visitors; their tabs close with the test."
    made = []

    def visitor(**options):
        made.append(Visitor(chromium, server, **options))
        return made[-1]

    yield visitor
    for v in made: v.context.close()


# Quarto marks the body, smalldocs its parent.
DARK = "document.querySelector('.quarto-dark') !== null"


def unfold(page, part):
    "Open a part of the sidebar, and give what stands in it."
    section = page.locator("#quarto-sidebar .sidebar-item-section", has_text=part).first
    toggle = section.locator(".sidebar-item-toggle").first
    if toggle.get_attribute("aria-expanded") == "false": toggle.click()
    section.locator(".sidebar-section.show").first.wait_for()
    return section


@slow
def test_every_page_opens_cleanly_and_asks_nobody_else(tour):
    assert not tour.errors, tour.errors
    assert not tour.outside, f"asked of other machines: {sorted(set(tour.outside))}"


@slow
def test_every_picture_has_alt_text(tour):
    assert not tour.all("bare"), tour.all("bare")


@slow
def test_code_of_100_columns_is_visible(tour):
    assert not tour.all("hidden"), tour.all("hidden")


@slow
def test_no_table_is_cut(tour):
    assert not tour.all("lost"), tour.all("lost")   # wider than the page, in no box that scrolls
    assert not tour.pages["report.html"]["cut"], tour.pages["report.html"]["cut"]


@slow
def test_nothing_overflows_on_a_phone(tour):
    wide = {p: notes["phone"] for p, notes in tour.pages.items() if notes["phone"] > PHONE["width"]}
    assert not wide, wide


@slow
def test_code_in_tables_has_no_backslash_and_no_figure_a_bare_number(tour):
    assert not tour.all("bars"), tour.all("bars")
    assert not tour.all("captions"), tour.all("captions")


@slow
def test_every_page_says_tier_day_and_seconds(tour, report):
    day = f"on tier {report['tier']} on {run_day(report)}, in "
    for path, notes in tour.pages.items(): assert day in notes["page"], path
    ran = {e["path"][4:-6]: e["seconds"] for e in report["notebooks"] if e["status"] == "ok"}
    for name, seconds in ran.items():
        if (notes := tour.pages.get(f"{name}.html")):
            assert f"Ran {day}{seconds:,.1f} seconds." in notes["text"], name


@slow
def test_front_page_opens_with_pictures_and_has_a_card_a_lesson(visit):
    page = visit(viewport=DESK).open("index.html")
    top = page.locator("main h2").first.bounding_box()["y"]
    pictures = page.locator("main .gallery img")
    assert pictures.count() >= 2 and pictures.last.bounding_box()["y"] < top
    cards = page.locator("main .cards > ul > li > strong a")
    shown = [h.split("/", 3)[3] for h in cards.evaluate_all("all => all.map(a => a.href)")]
    taught = [o for o in lessons(ROOT) if o.part and o.part not in MACHINERY]
    assert shown == [f"{o.name}.html" for o in taught if not o.lesson]
    for name in (o.name for o in taught if o.lesson):
        assert page.locator(f"main .cards a[href$='{name}.html']").count(), name


@slow
def test_sidebar_is_folded_and_leads_to_every_page(visit, tour, server):
    links = set(tour.pages["index.html"]["links"])
    assert {server + p for p in tour.pages} <= links, {server + p for p in tour.pages} - links
    sizes = Counter(p.split("/")[0] for p in tour.pages if not p.startswith("reference/"))
    parts = {p.split("/")[0] for p in tour.pages if "/" in p}
    limit = 9 + len(parts) + max(sizes.values())   # what is always there, and one part unfolded
    crowded = {p: notes["visible"] for p, notes in tour.pages.items() if notes["visible"] > limit}
    assert not crowded, crowded
    page = visit(viewport=DESK).open("index.html")
    unfold(page, "How the course works").locator("a", has_text="The switch").click()
    page.wait_for_url("**/lib/01_tier.html")
    assert page.locator("h1.title").inner_text() == "The switch"
    assert page.locator("#quarto-sidebar .sidebar-link.active", has_text="The switch").is_visible()
    hello = page.locator("#quarto-sidebar a", has_text="Hello, language model").first
    assert not hello.is_visible()


@slow
def test_sidebar_opens_on_a_phone(visit):
    page = visit(viewport=PHONE).open("index.html")
    sidebar = page.locator("#quarto-sidebar")
    box = sidebar.bounding_box()
    closed = box is None or box["x"] + box["width"] <= 0 or box["x"] >= PHONE["width"]
    assert closed, f"the closed sidebar is at {box}"
    page.locator(".quarto-btn-toggle").click()
    link = unfold(page, "How the course works").locator("a", has_text="The switch")
    link.scroll_into_view_if_needed()
    box = sidebar.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"] + 1, box
    link.click()
    page.wait_for_url("**/lib/01_tier.html")


@slow
def test_search_finds_and_opens_a_page(visit, engine):
    page = visit(viewport=DESK).open("index.html")
    page.locator("#quarto-search input").fill("table of settings")
    names = dict(smalldocs=".search-result", quarto=".search-result-link")
    result = page.locator(names[engine]).first
    result.wait_for()
    assert "The switch" in result.inner_text()
    result.click()
    page.wait_for_url("**/lib/01_tier.html*")


@slow
def test_dark_mode_follows_the_system_toggles_and_stays(visit):
    dark = visit(viewport=DESK, color_scheme="dark").open("index.html")
    dark.wait_for_function(DARK)
    page = visit(viewport=DESK, color_scheme="light").open("index.html")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    assert not page.evaluate(DARK) and dark.evaluate(background) != light
    page.locator(".quarto-color-scheme-toggle").first.click()
    page.wait_for_function(DARK)
    assert page.evaluate(background) != light
    page.goto(page.url.replace("index.html", "lib/01_tier.html"))
    assert page.evaluate(DARK), "the next page forgot the dark mode"
    page.locator(".quarto-color-scheme-toggle").first.click()
    page.wait_for_function(f"!({DARK})")
    assert page.evaluate(background) == light


def representatives(tour) -> list[str]:
    "Few and small pages that show each folder and each kind of element, by its tag and classes."
    if os.environ.get("MLCOURSE_AXE") == "all": return list(tour.pages)
    def place(path): return re.sub(r"\d|/.*(?=_more)|/.*", "", path)   # week, week_more, reference
    kinds = {path: {place(path), *notes["kinds"]} for path, notes in tour.pages.items()}
    missing, chosen = set().union(*kinds.values()), []
    while missing:
        chosen.append(max(kinds, key=lambda p: len(kinds[p] & missing) / tour.pages[p]["size"]))
        missing -= kinds[chosen[-1]]
    return chosen


# Cells that show nothing that an earlier cell of the page has not shown.
REPEATED = """() => {
    const seen = new Set();
    for (const cell of document.querySelectorAll('main .cell')) {
        const kinds = [...cell.querySelectorAll('*')].map(KIND);
        if (kinds.every(kind => seen.has(kind))) cell.dataset.repeated = '';
        for (const kind of kinds) seen.add(kind);
    } }""".replace("KIND", KIND)


@slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, tour, scheme):
    v, axe, found = visit(viewport=DESK, color_scheme=scheme), Axe(), []
    options = {"resultTypes": ["violations"]}
    if scheme == "dark": options["runOnly"] = ["color-contrast", "link-in-text-block"]
    for path in representatives(tour):
        page = v.open(path)
        page.wait_for_function(DARK if scheme == "dark" else f"!({DARK})")
        if os.environ.get("MLCOURSE_AXE") != "all": page.evaluate(REPEATED)
        context = {"exclude": [["[data-repeated]"]]}
        for problem in axe.run(page, context, options).response["violations"]:
            if problem["impact"] in ("serious", "critical"):
                nodes = problem["nodes"]
                shown = [n["html"][:140] for n in nodes[:3]]
                about = nodes[0].get("failureSummary", "")
                found.append(f"{path}: {problem['id']} x{len(nodes)} {shown} {about[:200]}")
    assert not found, "\n".join(found)


def squeeze(text):
    return re.sub(r"\s+", "", text)


def directive(source, name):
    return re.search(rf"^#\|\s*{name}\s*$", source, re.M)


def code_of(source):
    return squeeze("\n".join(line for line in source.splitlines() if not line.startswith("#|")))


@slow
def test_hidden_is_hidden_and_exported_is_shown(tour, run_dir):
    checked = 0
    for lesson in lessons(ROOT):
        executed = run_dir/"nbs"/lesson.path
        if not executed.is_file(): continue
        notes = tour.pages[lesson.path.with_suffix(".html").as_posix()]
        text = squeeze(notes["text"])
        for cell in json.loads(executed.read_text(encoding="utf-8"))["cells"]:
            source, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
            if cell["cell_type"] != "code" or not code_of(source): continue
            hidden = directive(source, "hide") or "injected-parameters" in tags
            if hidden: assert code_of(source) not in text, f"{lesson.path} shows {source[:80]!r}"
            elif directive(source, "exports") or "parameters" in tags:
                assert code_of(source) in text, f"{lesson.path} hides {source[:80]!r}"
            checked += bool(hidden or directive(source, "exports"))
            if says(source, "code-fold") == "true" and not directive(source, "export"):   # unseen
                summary = says(source, "code-summary") or "Code"
                assert [summary, False] in notes["folds"], f"{lesson.path} unfolds {source[:80]!r}"
        solved = [name for name, is_open in notes["folds"] if "Solution" in name and is_open]
        assert not solved and not any(notes["know"]), f"{lesson.path} shows what is folded"
    assert checked > 5


@slow
def test_exported_functions_are_documented(visit):
    page = visit().open("reference/tier.html")
    for name in ("TIERS", "Card", "find_cards", "choose"):
        assert page.locator(f"main #{name.lower()}").count() == 1, name
    row = page.locator("main tr", has_text="no tuple: alike on all")
    row = row.inner_text().split("\t")
    assert [c.strip() for c in row[:2]] == ["settings", "Any"]
    assert row[2].strip().startswith("name=(tiny, 12gb) or name=(tiny, 12gb, 16gb)")
    page.locator("main a", has_text="The switch").first.click()
    page.wait_for_url("**/lib/01_tier.html")
    assert page.locator("main .doc", has_text="no tuple: alike on all").count() == 1


class Links(HTMLParser):
    "The links and the anchors of a page."

    def __init__(self, text):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[k] for k in ("href", "src") if attrs.get(k)]
        if attrs.get("id"): self.ids.add(attrs["id"])


@slow
def test_internal_links_resolve(site, pages):
    parsed = {p: Links((site/p).read_text(encoding="utf-8")) for p in pages}
    broken = []
    for path, page in parsed.items():
        for link in page.links:
            parts = urlsplit(urljoin(f"http://site/{path}", link))
            if parts.netloc != "site" or parts.scheme != "http": continue
            target = unquote(parts.path).lstrip("/") or "index.html"
            target += "index.html" if target.endswith("/") else ""
            anchor = unquote(parts.fragment)
            lost = anchor and target in parsed and anchor not in parsed[target].ids
            if lost or not (site/target).is_file(): broken.append(f"{path}: {link}")
    assert not broken, broken


@slow
def test_llms_txt_lists_every_page_with_its_subtitle(site, pages):
    text = (site/"llms.txt").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^- \[.+?\]\((.+?)\)(?:: (.+))?$", text, re.M))
    assert set(listed) == set(pages)
    assert not [p for p, about in listed.items() if not about]


@slow
def test_report_card_shows_the_run(tour, report):
    text = tour.pages["report.html"]["text"]
    for nb in report["notebooks"]:
        assert nb["path"].removeprefix("nbs/").removesuffix(".ipynb") in text
        for name in nb["metrics"]: assert name in text


def picture():
    "A small white PNG."
    from PIL import Image
    file = io.BytesIO()
    Image.new("RGB", (900, 300), "white").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="session")
def awkward(engine, tmp_path_factory):
    "A site whose one run notebook failed, after it had shown everything that is hard to show."
    folder = tmp_path_factory.mktemp("awkward")
    def bar(text): return new_output("stream", name="stderr", text=text)
    def data(kind, value, text):
        return new_output("display_data", {kind: value, "text/plain": text})
    cells = "".join(f"<td>a wide column {n}</td>" for n in range(30))
    bright = '<pre style="white-space:pre;overflow-x:auto"><b style="color: #ff0">bright</b></pre>'
    outputs = [bar("  0%|    | 0/2\r"), bar(" 50%|##  | 1/2\r100%|####| 2/2\n"),
               data("application/vnd.jupyter.widget-view+json", {}, "a widget's text"),
               data(MIME, dict(name="wer", value=0.1), "wer = 0.1"),
               data("text/html", bright, "\x1b[33mbright\x1b[0m"),
               data("text/html", f"<table><tr>{cells}</tr></table>", "a table")]
    figure = '#| label: fig-x\n#| fig-alt: "A white box, 3:1"\nplot()'
    raised = new_output("error", ename="TargetMissed", evalue="wer = 0.4",
                        traceback=["\x1b[31mTargetMissed\x1b[0m: wer = 0.4"])
    def marker():
        tags = dict(tags=["papermill-error-cell-tag"])
        return new_markdown_cell("An Exception was encountered", metadata=tags)
    nb = new_notebook(cells=[
        marker(), new_markdown_cell("# The switch\n\n> A promise."),
        new_code_cell("#| default_exp tier"),
        new_code_cell("show()", outputs=outputs),
        new_code_cell(figure, outputs=[data("image/png", picture(), "a figure")]),
        new_code_cell('#| code-fold: true\n#| code-summary: "Solution"\nanswer = 42'),
        new_markdown_cell("A formula: $\\frac{a}{b}$, and $$x^2$$"),
        new_markdown_cell("| a | b |\n|---|---|\n| `c \\| d` | e |"),
        new_markdown_cell("## How we know\n\nBecause.\n\n### In the end\n\nA proof."),
        marker(), new_code_cell("check()", outputs=[raised])])
    (folder/"run/nbs/lib").mkdir(parents=True)
    nbformat.write(nb, folder/"run/nbs/lib/01_tier.ipynb")
    error = dict(cell=8, type="TargetMissed", message="wer = 0.4")
    entry = dict(path="nbs/lib/01_tier.ipynb", status="failed", seconds=1.0, peak_rss_mb=1,
                 peak_vram_mb=None, error=error, metrics={})
    report = dict(tier="tiny", commit=None, started="2026-11-08T09:00:00+00:00", seconds=1.0,
                  versions={}, machine=dict(cards=[]), notebooks=[entry])
    (folder/"run/report.json").write_text(json.dumps(report))
    return build(folder/"run", folder/"docs", folder/"stage", engine=engine)


@slow
def test_staged_outputs_are_lines_and_labels_are_gone(awkward):
    "Quarto drops text that is one string, and numbers a figure that has a label and no caption."
    cells = json.loads((awkward.parent/"stage/lib/01_tier.ipynb").read_text())["cells"]
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    texts = [out["text"] for out in outputs if "text" in out]
    texts += [v for out in outputs for k, v in out.get("data", {}).items() if k.startswith("text/")]
    assert len(texts) > 4 and all(isinstance(text, list) for text in texts), texts
    assert not [cell for cell in cells if "fig-x" in "".join(cell["source"])]


@slow
def test_a_failed_notebook_with_awkward_outputs_is_a_clean_page(chromium, awkward):
    with serving(awkward) as server:
        v = Visitor(chromium, server, viewport=PHONE, color_scheme="dark")
        page = v.open("lib/01_tier.html")
        text = page.locator("main").inner_text()
        for shown in ("This run failed", "TargetMissed in cell 8: wer = 0.4", "a widget's text",
                      "wer = 0.1", "100%|####| 2/2", "bright"): assert shown in text, shown
        for gone in ("50%", "An Exception was encountered", "\x1b", "[33m", "frac", "default_exp"):
            assert gone not in text, gone
        assert page.locator("main img").get_attribute("alt") == "A white box, 3:1"
        assert page.locator("main math").count() == 2
        assert page.locator("main td code").inner_text() == "c | d"
        assert page.locator("main figcaption").count() == 0
        assert not page.locator("main", has_text="A proof.").locator("#in-the-end").is_visible()
        page.goto(page.url + "#in-the-end")
        page.locator("main #in-the-end").wait_for()
        solution = page.locator("details.code-fold")
        assert not solution.locator("code").is_visible()
        solution.locator("summary").click()
        assert "answer = 42" in solution.locator("code").inner_text()
        assert page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"]
        found = Axe().run(page).response["violations"]
        bad = [p for p in found if p["impact"] in ("serious", "critical")]
        assert not bad, bad
        assert not v.errors and not v.outside, (v.errors, v.outside)
        v.context.close()


def test_without_a_run_the_next_step_is_named(tmp_path):
    with pytest.raises(SiteError, match="run `make course` first"): build(tmp_path, tmp_path/"docs")


def test_readme_is_in_step_with_the_front_page():
    written = (ROOT/"README.md").read_text(encoding="utf-8")
    assert written == readme_text(ROOT), "README.md is old: run `make tidy`"


def test_pictures_of_the_front_page_are_described_and_stored():
    sources = [cell["source"] for _, cell in figures(ROOT)]
    found = [(says(source, "label"), says(source, "fig-alt")) for source in sources]
    assert found and all(label and alt for label, alt in found), found
    stored = sorted(p.stem for p in (ROOT/"nbs/images").glob("*.png"))
    assert sorted(label for label, _ in found) == stored   # each once
