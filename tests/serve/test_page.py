"""The search page in a real browser: a person's way through it, on a phone and in the dark, with errors and hostile captions."""

import io
import re
import shutil

import pytest
from PIL import Image

pytest.importorskip("starlette")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import expect  # noqa: E402
from serve.fake_api import COLORS, HOSTILE, ITEMS, Fake, serving  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no system Chromium: apt-get install chromium"),
]
TILES = "#view-search .tile"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server():
    fake = Fake()
    with serving(fake.app) as url:
        fake.url = url
        yield fake


@pytest.fixture
def open_page(browser, server):
    """Opens the page at a fragment. Afterwards: no error in it, and no request to anywhere else."""
    opened = []

    def open_page(fragment="", width=1280, height=900, url=None, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        page = context.new_page()
        page.problems, page.urls = [], []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
        page.on("request", lambda request: page.urls.append(request.url))
        page.goto((url or server.url) + fragment)
        expect(page.locator("body")).not_to_contain_text("Opening the collection")
        opened.append((page, url or server.url))
        return page

    yield open_page
    server.broken.clear()
    for page, url in opened:
        # the browser itself reports failed responses, and looks for an icon
        problems = [text for text in page.problems if "Failed to load resource" not in text]
        assert not problems
        assert all(each.startswith(url) for each in page.urls), page.urls
        page.context.close()


def search(page, text):
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")


def captions(page, inside=TILES):
    return page.locator(f"{inside} .caption").all_inner_texts()


def picture(color):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), COLORS[color]).save(buffer, "PNG")
    return {"name": f"{color}.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def no_sideways(page):
    return page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


# ------------------------------------------------------------ queries


def test_the_first_page_helps(open_page):
    page = open_page()
    expect(page.locator(TILES)).to_have_count(18)
    page.get_by_role("link", name="a small orange square", exact=True).first.click()
    expect(page.locator("#text")).to_have_value("a small orange square")
    expect(page.locator(f"{TILES} .caption").first).to_have_text("a small orange square")


def test_search_by_text(open_page):
    page = open_page()
    search(page, "a large red star")
    expect(page.locator("#status")).to_contain_text("60 images of 96, nearest first")
    assert captions(page)[0] == "a large red star"
    assert page.locator(f"{TILES} .note").first.inner_text() == "0.418"
    assert "text=a+large+red+star" in page.url
    page.get_by_role("button", name="Show more").click()
    expect(page.locator(TILES)).to_have_count(96)
    assert no_sideways(page)


def test_search_by_image_and_by_both(open_page):
    page = open_page()
    page.locator("#file").set_input_files(picture("blue"))
    expect(page.locator("#status")).to_contain_text("· image ·")
    expect(page.locator("#picture canvas")).to_be_visible()
    expect(page.locator("#text")).to_have_attribute("placeholder", re.compile("as one sequence"))
    assert all("blue" in text for text in captions(page)[:16])
    search(page, "a small star")
    expect(page.locator("#status")).to_contain_text("image and text as one sequence")
    expect(page.locator(f"{TILES} .caption").first).to_have_text("a small blue star")
    page.get_by_role("button", name="Remove the picture").click()
    expect(page.locator("#status")).to_contain_text("· text ·")
    page.go_back()
    expect(page.locator("#status")).to_contain_text("image and text as one sequence")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_drop_and_paste(open_page, way):
    page = open_page()
    expect(page.locator(TILES)).to_have_count(18)
    page.evaluate(
        """async ([way, color]) => {
            const canvas = Object.assign(document.createElement("canvas"), { width: 20, height: 20 });
            const pen = canvas.getContext("2d");
            pen.fillStyle = `rgb(${color})`;
            pen.fillRect(0, 0, 20, 20);
            const blob = await new Promise((resolve) => canvas.toBlob(resolve));
            const data = new DataTransfer();
            data.items.add(new File([blob], "dropped.png", { type: "image/png" }));
            const event = way === "drop"
                ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
                : new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
            document.body.dispatchEvent(event);
        }""",
        [way, list(COLORS["purple"])],
    )
    expect(page.locator("#status")).to_contain_text("· image ·")
    assert "purple" in captions(page)[0]


def test_exclude_and_filters(open_page):
    page = open_page("#text=star")
    page.locator("#not").fill("red")
    page.locator("#not").press("Enter")
    expect(page.locator(f"{TILES} .caption").first).to_have_text("a small orange star")
    assert not any("red star" in text for text in captions(page)[:16])
    page.locator("#folder").select_option("green")
    expect(page.locator(TILES)).to_have_count(16)
    page.locator("#tag").fill("triangle")
    page.locator("#tag").press("Enter")
    expect(page.locator(TILES)).to_have_count(4)
    expect(page.locator("#status")).to_contain_text("4 images that match the filters")
    page.locator("#tag").fill("circle")
    page.locator("#tag").press("Enter")
    expect(page.locator("#view-search")).to_contain_text("No image has these tags")
    page.get_by_role("link", name="Remove the tag “circle”").click()
    expect(page.locator(TILES)).to_have_count(4)
    page.get_by_role("link", name="Clear the search").click()
    expect(page.locator(TILES)).to_have_count(18)
    assert not page.locator("#not").input_value()


def test_more_like_this(open_page):
    page = open_page("#text=a+large+green+circle")
    page.get_by_role("link", name="More like this: a large green circle").first.click()
    expect(page.locator("#picture")).to_contain_text("like a large green circle")
    expect(page.locator("#text")).to_have_value("")
    expect(page.locator("#status")).to_contain_text("an image of the collection")
    assert captions(page)[:4] == [item.captions[0] for item in ITEMS if (item.color, item.shape) == ("green", "circle")]
    page.go_back()
    expect(page.locator("#text")).to_have_value("a large green circle")


def test_a_link_opens_the_same_page(open_page):
    page = open_page("#text=star&tag=red&not=small&open=0%2F7")
    expect(page.locator("#detail-title")).to_have_text("a large red star")
    expect(page.locator("#not")).to_have_value("small")
    page.keyboard.press("Escape")
    expect(page.locator("#detail")).to_be_hidden()
    expect(page.locator(TILES)).to_have_count(16)
    assert "open" not in page.url
    again = open_page("#image=gone")
    expect(again.locator("#error")).to_contain_text("Choose the picture again")


# ------------------------------------------------------------ one image


def test_detail(open_page):
    page = open_page("#text=a+large+blue+square")
    page.locator(f"{TILES} .open").first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading", name="a large blue square")).to_be_visible()
    expect(dialog).to_contain_text("blue square on a pale ground")
    expect(dialog).to_contain_text("blue/large-square-")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#detail-title")).to_have_text(captions(page)[1])
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert page.evaluate("document.activeElement.matches('.tile:nth-child(2) .open')")
    page.go_forward()
    expect(dialog).to_be_visible()
    page.go_back()
    expect(dialog).to_be_hidden()


def test_classify_an_image(open_page):
    page = open_page("#text=a+large+blue+square&open=0%2F27")
    page.locator("#classify-labels").fill("a red star\na large blue square\n\na green circle")
    page.get_by_role("button", name="Classify").click()
    rows = page.locator("#bars li")
    expect(rows).to_have_count(3)
    assert rows.first.inner_text().splitlines()[0] == "a large blue square"
    values = [float(text.split()[0]) for text in page.locator("#bars .note").all_inner_texts()]
    assert sum(values) == pytest.approx(100, abs=0.2)
    assert values == sorted(values, reverse=True)
    width = page.locator("#bars .bar-fill").first.evaluate("bar => bar.clientWidth / bar.parentElement.clientWidth")
    assert width == pytest.approx(values[0] / 100, abs=0.02)
    page.keyboard.press("Escape")
    page.locator(f"{TILES} .open").first.click()  # the labels stay
    expect(rows).to_have_count(3)


def test_classify_a_chosen_picture(open_page):
    page = open_page()
    page.locator("#file").set_input_files(picture("red"))
    page.locator("#picture a").click()
    expect(page.locator("#detail-title")).to_have_text("red.png")
    expect(page.locator("#where")).to_be_hidden()
    page.locator("#classify-labels").fill("one\ntwo")
    page.get_by_role("button", name="Classify").click()
    expect(page.locator("#bars li")).to_have_count(2)


def test_localize(open_page):
    page = open_page("#text=star&open=0%2F7")
    page.locator("#where-text").fill("star")
    page.locator("#where-text").press("Enter")
    canvas = page.locator("#detail-picture canvas")
    expect(canvas).to_have_attribute("aria-label", "Heat map: where the picture matches “star”")
    x, y = ITEMS[7].spot
    pixel = (
        "(canvas, [x, y]) => [...canvas.getContext('2d').getImageData(x * canvas.width, y * canvas.height, 1, 1).data]"
    )
    assert canvas.evaluate(pixel, [x, y])[0] > 180
    page.get_by_role("link", name="without the map").click()
    expect(page.locator("#detail-picture img")).to_be_visible()
    other = open_page("#in=1&text=star&open=1%2F7")  # of a model that cannot
    expect(other.locator("#detail-title")).to_have_text("a large red star")
    expect(other.locator("#where")).to_be_hidden()


# ------------------------------------------------------------ the collection


def test_labels(open_page):
    page = open_page()
    page.get_by_role("link", name="Labels").click()
    page.locator("#sort-labels").fill("\n".join(COLORS))
    page.get_by_role("button", name="Sort").click()
    expect(page.locator("#sort-status")).to_have_text("96 images sorted by 6 labels.")
    groups = page.locator(".group")
    expect(groups).to_have_count(6)
    expect(groups.nth(2)).to_contain_text("16 images, 16.7 %")
    assert all("green" in text for text in groups.nth(2).locator(".caption").all_inner_texts())
    groups.nth(2).locator(".open").first.click()
    expect(page.locator("#detail-title")).to_have_text("a small green circle")
    page.keyboard.press("Escape")
    page.locator("#sort-labels").fill("alone")
    page.get_by_role("button", name="Sort").click()
    expect(page.locator("#sort-error")).to_have_text("Type at least two labels, one per line.")
    page.locator("#sort-labels").fill("red\nblue")
    page.locator("summary").click()
    page.locator("#sort-prompts").fill("a photo of a thing")
    page.get_by_role("button", name="Sort").click()
    expect(page.locator("#sort-error")).to_have_text("Each prompt must have {} once, for the label.")
    page.locator("#sort-prompts").fill("a photo of a {}")
    page.get_by_role("button", name="Sort").click()
    expect(page.locator("#sort-status")).to_have_text("96 images sorted by 2 labels.")


FIRST_DOT = """(canvas) => {
  const pen = canvas.getContext("2d");
  for (let x = 20; x < canvas.width - 20; x += 4) {
    const column = pen.getImageData(x, 60, 1, canvas.height - 80).data;
    for (let y = 0; 4 * y < column.length; y++) if (column[4 * y + 3] > 200) return [x, y + 60];
  }
}"""


def test_map(open_page):
    page = open_page("#text=a+large+star")
    page.get_by_role("link", name="Map").click()
    expect(page.locator("#status")).to_have_text("96 images; 60 of the 60 nearest to “a large star” are marked.")
    canvas = page.locator("#canvas")
    page.wait_for_timeout(100)
    used = "canvas => new Set(new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"
    assert canvas.evaluate(used) > 10  # dots in several colors with soft edges
    box = canvas.bounding_box()
    spot = canvas.evaluate(FIRST_DOT)
    page.mouse.move(box["x"] + spot[0], box["y"] + spot[1])
    expect(page.locator("#tip img")).to_be_visible()
    expect(page.locator("#tip .caption")).not_to_be_empty()
    shown = page.locator("#tip .caption").inner_text()
    page.mouse.click(box["x"] + spot[0], box["y"] + spot[1])
    expect(page.locator("#detail-title")).to_have_text(shown)
    page.keyboard.press("Escape")
    page.mouse.move(box["x"] + 300, box["y"] + 300)
    before = len(page.urls)
    for _ in range(8):
        page.mouse.wheel(0, -400)
    page.wait_for_timeout(300)
    assert any("side=128" in url for url in page.urls[before:])  # close up, images stand for their dots
    page.mouse.down()
    page.mouse.move(box["x"] + 500, box["y"] + 300, steps=4)
    page.mouse.up()
    expect(page.locator("#detail")).to_be_hidden()  # that was no click
    canvas.focus()
    page.keyboard.press("0")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#tip img")).to_be_visible()
    page.keyboard.press("Enter")
    expect(page.locator("#detail")).to_be_visible()


def test_two_collections_side_by_side(open_page):
    page = open_page("#text=a+red+star")
    page.locator("#beside").select_option("1")
    sides = page.locator(".beside > section")
    expect(sides).to_have_count(2)
    expect(sides.nth(1).locator("h2")).to_have_text("shapes, before")
    places = "links => links.map(link => link.dataset.place.split('/')[1])"
    ranks = [
        {row: rank for rank, row in enumerate(sides.nth(side).locator(".open").evaluate_all(places), 1)}
        for side in (0, 1)
    ]
    marks = (
        sides.nth(0)
        .locator(".tile")
        .evaluate_all("tiles => tiles.map(tile => tile.querySelector('.mark')?.textContent ?? '')")
    )
    expected = [f"in both · rank {ranks[1][row]} there" if row in ranks[1] else "" for row in ranks[0]]
    assert marks == expected
    assert any(marks)
    assert not all(marks)
    both = len(set(ranks[0]) & set(ranks[1]))
    expect(page.locator("#status")).to_have_text(f"{both} images found in both, of 60 and 60 results.")
    page.set_viewport_size({"width": 390, "height": 800})
    tops = [sides.nth(side).bounding_box() for side in (0, 1)]
    assert tops[1]["y"] > tops[0]["y"] + tops[0]["height"] - 1  # stacked
    assert no_sideways(page)


def test_one_collection_has_no_choice(open_page, browser):
    with serving(Fake(collections=1).app) as url:
        page = open_page(url=url)
        expect(page.locator("#about")).to_have_text("96 images · oner, 10 epochs")
        expect(page.locator("#collections")).to_be_hidden()


# ------------------------------------------------------------ people and their machines


def test_keyboard(open_page):
    page = open_page("#view=labels")
    page.get_by_role("button", name="Sort").focus()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("red")
    page.keyboard.press("Enter")
    expect(page.locator(TILES)).to_have_count(60)
    at = "[...document.querySelectorAll('#view-search .open')].indexOf(document.activeElement)"
    columns = page.locator("#view-search .grid").evaluate(
        "grid => getComputedStyle(grid).gridTemplateColumns.split(' ').length"
    )
    visited = []
    for key in ("ArrowDown", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "End", "Home"):
        page.keyboard.press(key)
        visited.append(page.evaluate(at))
    assert visited == [0, 1, 1 + columns, columns, 0, 59, 0]
    page.keyboard.press("Enter")
    expect(page.locator("#detail")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#detail")).to_be_hidden()
    assert page.evaluate(at) == 0
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "More like this"
    page.keyboard.press("Tab")  # one tile only is in the order of Tab
    assert page.evaluate("document.activeElement.textContent") == "Show more"


@pytest.mark.parametrize(
    "fragment",
    [
        "",
        "#text=red&beside=1",
        "#view=labels&label=red&label=blue",
        "#view=map",
        "#text=red&not=star&tag=red&like=red/small-circle-0.png",
        "#text=red&open=0%2F5",
    ],
)
def test_phone(open_page, fragment):
    page = open_page(fragment, width=360, height=700, has_touch=True, is_mobile=True)
    page.wait_for_timeout(200)
    assert no_sideways(page)
    small = page.evaluate(
        """[...document.querySelectorAll("button, input, select, textarea, nav a")]
            .filter((each) => each.offsetParent && each.getBoundingClientRect().height < 24 && !each.matches(".hidden"))
            .map((each) => each.outerHTML)"""
    )
    assert not small  # WCAG 2.5.8


CONTRAST = """(root) => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = channels(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    throw new Error("no ground");
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if ((!own && !element.matches("input, textarea")) || !element.offsetParent || element.matches(":disabled, .hidden")) continue;
    const pseudo = element.matches(":placeholder-shown") ? "::placeholder" : null;
    const [a, b] = [luminance(channels(getComputedStyle(element, pseudo).color)), luminance(ground(element))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${element.outerHTML.slice(0, 120)}: ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_light_and_dark(open_page, scheme):
    page = open_page("#text=red&beside=1&not=star&tag=red", color_scheme=scheme)
    expect(page.locator(TILES).first).to_be_visible()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
    assert page.evaluate(CONTRAST) == []
    page.locator(f"{TILES} .open").first.click()
    page.locator("#classify-labels").fill("one\ntwo")
    page.get_by_role("button", name="Classify").click()
    expect(page.locator("#bars li")).to_have_count(2)
    assert page.evaluate(CONTRAST) == []
    page = open_page("#view=labels&label=red&label=red+star", color_scheme=scheme)
    expect(page.locator(".group")).to_have_count(2)
    assert page.evaluate(CONTRAST) == []


def test_names_and_roles(open_page):
    for fragment in ("#text=red&open=0%2F1&label=a&label=b", "#view=labels&label=red&label=blue", "#view=map"):
        page = open_page(fragment)
        page.wait_for_timeout(150)
        nameless = page.evaluate(
            """[...document.querySelectorAll("input, select, textarea, button, a, img")].filter((each) => {
                if (each.matches("img")) return !each.hasAttribute("alt");
                return !(each.labels?.length || each.getAttribute("aria-label") || each.textContent.trim() || each.placeholder);
            }).map((each) => each.outerHTML)"""
        )
        assert not nameless
        assert page.locator("h1").count() == 1
        assert page.locator("#status").get_attribute("role") == "status"
        assert page.locator("nav [aria-current=page]").count() == 1


# ------------------------------------------------------------ errors and attacks


def test_errors_are_shown(open_page, server):
    page = open_page()
    server.broken["/api/search"] = (503, "The server is busy. Try again in a moment.")
    search(page, "red")
    expect(page.get_by_role("alert").first).to_have_text("The server is busy. Try again in a moment.")
    expect(page.locator(TILES)).to_have_count(0)
    server.broken.clear()
    page.get_by_role("button", name="Search").click()  # the failure was not remembered
    expect(page.locator(TILES)).to_have_count(60)
    expect(page.locator("#error")).to_be_hidden()
    server.broken["/api/classify"] = (422, "The labels are too long.")
    server.broken["/api/localize"] = (422, "This model has no maps.")
    page.locator(f"{TILES} .open").first.click()
    page.locator("#where-text").fill("red")
    page.locator("#where-text").press("Enter")
    expect(page.locator("#where-status")).to_have_text("This model has no maps.")
    page.locator("#classify-labels").fill("one\ntwo")
    page.get_by_role("button", name="Classify").click()
    expect(page.locator("#bars")).to_have_text("The labels are too long.")
    server.broken["/api/map"] = (500, "The map could not be computed.")
    page = open_page("#view=map")
    expect(page.locator("#error")).to_have_text("The map could not be computed.")
    server.broken["/api/item"] = server.broken["/api/image"] = (404, "The image is gone.")
    page = open_page("#text=red")
    expect(page.locator(f"{TILES} .missing").first).to_have_text("This image cannot be read.")
    server.broken["/api/collections"] = (401, "A token is needed.")
    page = open_page()
    expect(page.locator("#error")).to_have_text("A token is needed.")


def test_a_server_that_stopped(browser, open_page):
    with serving(Fake().app) as url:
        page = open_page(url=url)
        expect(page.locator(TILES)).to_have_count(18)
    search(page, "red")
    expect(page.locator("#error")).to_contain_text("The server does not respond")


@pytest.mark.parametrize(
    "fragment",
    ["#text=triangle&beside=1", "#view=labels&label=red&label=blue", "#like=red%2Flarge-triangle-5.png"],
)
def test_hostile_captions_are_text(open_page, fragment):
    page = open_page(fragment)
    caption = page.locator("section:not([hidden]) .caption", has_text="onerror").first
    expect(caption).to_have_text(HOSTILE)
    page.locator('section:not([hidden]) .open[data-place="0/5"]').first.click()
    expect(page.locator("#detail-title")).to_have_text(HOSTILE)
    assert page.locator("main b, dialog b, img[src='x']").count() == 0
    assert page.evaluate("window.attacked") is None


def test_a_hostile_address_is_text(open_page):
    attack = "%3Cimg%20src%3Dx%20onerror%3D%22window.attacked%3Dtrue%22%3E"
    names = ("text", "not", "like", "tag", "folder", "label", "where", "in", "beside", "view", "top")
    for address in ("&".join(f"{name}={attack}" for name in names), f"view=labels&label={attack}&open={attack}"):
        page = open_page(f"#{address}")
        page.wait_for_timeout(200)
        assert page.evaluate("window.attacked") is None
        assert page.locator("img[src='x']").count() == 0
