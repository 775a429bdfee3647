"""The page, opened in headless Chromium: no errors, pictures load, filter and search work, texts are texts."""

import shutil

import pytest
from conftest import make_pipeline

import evaluate

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

PROMPTS = ["a red circle on a blue background", "<b>bold</b> & <script>alert(1)</script>", 'a "quoted" {{ cat }} $x$ prompt']


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Two models on a named set and on a file with prompts that try to be markup."""
    folder = tmp_path_factory.mktemp("report")
    for seed, name in enumerate(("base", "other")):
        make_pipeline(seed).save_pretrained(folder / name)
    (folder / "mine <i>.txt").write_text("\n".join(PROMPTS))
    (folder / "plain.py").write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        evaluate.main(
            ["--models", f"base={folder}/base", f"other={folder}/other", "--prompts", "toy-small", f"{folder}/mine <i>.txt",
             "--rewards", "plain:brightness", "--images_per_prompt", "2", "--num_steps", "2", "--guidance_scale", "1",
             "--output_dir", str(folder / "out")]
        )  # fmt: skip
    return folder / "out"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        flags = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request, browser, evaluation):
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: problems.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    page.goto((evaluation / "report.html").as_uri())
    yield page
    assert problems == []
    page.close()


def shown(page) -> list[str]:
    return page.locator(".card:visible p").all_inner_texts()


def test_pictures_load_and_nothing_is_wider_than_the_screen(page):
    page.select_option("#kind", "")
    for image in page.locator("img").all():
        image.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.locator(".card img").count() == 2 * page.locator(".card").count() > 0
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.locator("table tr").count() == 2 * 3  # the reward, and the diversity


def test_filter_and_search(page):
    assert len(shown(page)) == 4 and page.locator("#kind").input_value() == "random"  # not the best come first
    page.select_option("#kind", "")
    everything = len(shown(page))
    assert everything == 12 + 3 and page.locator("#count").inner_text() == "15 of 15"
    page.select_option("#set", "toy-small")
    assert len(shown(page)) == 12
    page.select_option("#kind", "best")
    assert len(shown(page)) == 4
    page.select_option("#kind", "")
    word = page.locator(".card p").first.inner_text().split()[-2]
    page.fill("#word", word.upper())
    found = shown(page)
    assert 0 < len(found) <= 12 and all(word in text for text in found)
    page.fill("#word", "nothing-has-this")
    assert shown(page) == [] and page.locator("#none").is_visible()
    page.fill("#word", "")
    page.select_option("#set", "")
    assert len(shown(page)) == everything


def test_pictures_come_before_numbers(page):
    assert page.locator("h2").all_inner_texts()[:2] == ["Pictures", "Numbers"]


def test_markup_in_prompts_and_names_is_text(page):
    page.select_option("#kind", "")
    page.fill("#word", "bold")
    (text,) = shown(page)
    assert PROMPTS[1] in text
    assert page.locator(".card b", has_text="bold").count() == 0
    page.fill("#word", "{{ cat }}")
    (text,) = shown(page)
    assert PROMPTS[2] in text and page.locator("th i").count() == 0


def test_numbers_are_those_of_the_table(page, evaluation):
    cells = [cell for line in (evaluation / "table.md").read_text().splitlines()[2:4] for cell in line.split("|")[3:-1]]
    texts = " ".join(page.locator("td").all_inner_texts())
    for cell in cells:
        mean, _, gain = cell.strip().partition(" (")
        assert mean in texts and gain.rstrip(")") in texts
