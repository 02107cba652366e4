# SPDX-License-Identifier: Apache-2.0
"""The viewer in headless Chromium, asking a real server; skipped where there is no Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.browser import CHROMIUM, Page, running_page
from tests.e2e.server import ROOT, Server, free_port

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium to run the viewer in; Debian's package is chromium"
)

VIEWER = ROOT / "examples" / "viewer" / "index.html"
#: JavaScript for what is on the page: each token's class, text, line below it and tooltip.
TOKENS = """[...document.querySelectorAll("#tokens .token")].map((cell) => [
    cell.classList.contains("masked") ? "masked" : cell.classList.contains("new") ? "new" : "",
    cell.children[0].textContent, cell.children[1].textContent, cell.title])"""
#: JavaScript for the positions that are painted as kept, for each layer.
PAINTED = """(() => {
    const canvas = $("kept"), paint = canvas.getContext("2d");
    const {trace, texts, promptLength} = shown;
    const layers = trace.refreshes[0].kept.length, length = promptLength + texts.length;
    paint.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--kept");
    const wanted = paint.fillStyle;
    const hex = (data) => "#" + [...data].slice(0, 3).map(
        (value) => value.toString(16).padStart(2, "0")).join("");
    const row = (canvas.height - 20) / layers, column = (canvas.width - 72) / length;
    return Array.from({length: layers}, (_, layer) => Array.from({length}, (_, i) => i).filter(
        (i) => hex(paint.getImageData(64 + (i + 0.4) * column, layer * row + 3, 1, 1).data)
            === wanted));
})()"""


@pytest.fixture(scope="module")
def server(default_server: Server) -> Server:
    return default_server


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with running_page() as page:
        yield page


@pytest.fixture
def page(browser: Page, server: Server) -> Page:
    """The page as a user opens it, with the server's address filled in."""
    browser.resize(1100, 900)
    browser.prefer("light")
    browser.open(VIEWER)
    browser.fill(server=str(server.client.base_url), model="tiny")
    return browser


def ask(page: Page, **fields: str | bool) -> dict[str, Any]:
    """Fill in the form, ask, stop playing, and return the server's answer."""
    page.fill(**fields)
    page.evaluate("$('asking').open = true, shown = null")
    page.click("ask")
    page.wait("shown !== null || !$('error').hidden")
    page.evaluate("stop()")
    assert page.evaluate("$('error').hidden"), page.evaluate("$('error').textContent")
    return page.evaluate("answer")


def refusal(page: Page, **fields: str | bool) -> str:
    """Fill in the form, ask, and return the error that is shown."""
    page.fill(**fields)
    page.click("ask")
    page.wait("!$('error').hidden && !$('waiting').textContent")
    return page.evaluate("$('error').innerText")


def opened(page: Page, path: Path, content: Any) -> None:
    """Write a file, and open it as a saved answer."""
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    page.evaluate("shown = null")
    page.choose_file("file", path)
    page.wait("shown !== null || !$('error').hidden")


def test_it_opens_and_asks_nobody(page: Page) -> None:
    assert page.problems == []
    assert [url for url in page.requested if not url.startswith("data:")] == [VIEWER.as_uri()]
    assert page.evaluate("$('answer').hidden && $('error').hidden")


def test_every_pass_of_a_response(page: Page) -> None:
    """Each position of the slider shows the tokens, their figures, and what each layer keeps."""
    answer = ask(page, block_length="16", keep_ratio="0.6")
    choice = answer["choices"][0]
    trace = choice["diffusion_trace"]
    texts = [entry["token"] for entry in choice["logprobs"]["content"]]
    prompt_length = len(answer["prompt_token_ids"])
    assert trace["nfe"] == len(texts) == 32 and len(trace["refreshes"]) == 2
    assert page.evaluate("[...$('prompt_tokens').children].map((cell) => cell.textContent)")[
        5:8
    ] == [" file", " name", " object"]
    for done in range(33):
        page.evaluate(
            f"$('step').value = {done}, $('step').dispatchEvent(new Event('input')), null"
        )
        for i, (kind, text, figures, title) in enumerate(page.evaluate(TOKENS)):
            step, confidence = trace["steps"][i], trace["confidences"][i]
            if step >= done:
                assert (kind, text.strip("\xa0"), title) == ("masked", "", f"position {i}: mask")
                continue
            assert kind == ("new" if step == done - 1 else "")
            assert text == texts[i].strip().removeprefix("<|").removesuffix("|>")
            assert figures == f"{step + 1} · {confidence:.2f}"
            assert f"{json.dumps(texts[i])}, pass {step + 1}, confidence" in title
        num = sum(step < done for step in trace["steps"])
        assert page.evaluate("$('where').textContent") == f"pass {done} of 32, {num} of 32 tokens"
        assert (
            page.evaluate("document.querySelectorAll('#order circle:not(.to-come)').length") == num
        )
        told = [refresh for refresh in trace["refreshes"] if refresh["step"] < done]
        kept = told[-1]["kept"] if told else [[]] * 4
        assert page.evaluate(PAINTED) == kept
        counts = [sum(i in layer for layer in kept) for i in range(prompt_length)]
        titles = page.evaluate("[...$('prompt_tokens').children].map((cell) => cell.title)")
        assert titles == [
            f"position {i}" + (f": kept by {count} of 4 layers" if told else "")
            for i, count in enumerate(counts)
        ]
    assert page.evaluate("shown.kinds") == ["full", "refresh", *["cached"] * 14] * 2
    assert page.problems == []


def test_playing(page: Page) -> None:
    """Playing shows each pass once, first to last; after a stop, it goes on from the same pass."""
    ask(page, speed="60")
    page.evaluate(
        """go(0), globalThis.seen = [], new MutationObserver(() => seen.push(
            Number($("step").value))).observe($("where"), {childList: true})"""
    )
    page.click("play")
    page.wait("timer === null && $('step').value === $('step').max")
    assert page.evaluate("seen") == list(range(1, 33))
    assert page.evaluate("$('play').textContent") == "Play"
    page.click("play")  # from the start again
    page.wait("seen.length > 34")
    page.click("play")
    stopped = page.evaluate("Number($('step').value)")
    assert page.evaluate("timer") is None and 0 < stopped < 32
    page.click("play")
    page.wait("timer === null && $('step').value === $('step').max")
    seen = page.evaluate("seen")
    assert seen[32:] == [0, *range(1, 33)]


def test_stepping(page: Page) -> None:
    ask(page)
    where = "Number($('step').value)"
    page.evaluate("go(5), document.activeElement.blur()")
    page.click("next")
    assert page.evaluate(where) == 6
    page.click("back")
    page.click("back")
    assert page.evaluate(where) == 4
    page.evaluate("document.activeElement.blur()")
    page.press("ArrowRight")
    assert page.evaluate(where) == 5
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    assert page.evaluate(where) == 3
    page.press(" ")
    page.wait("Number($('step').value) > 3")
    page.press(" ")
    assert page.evaluate("timer") is None
    page.evaluate("go(0), $('passes').children[9].click()")
    assert page.evaluate(where) == 10
    page.evaluate("go(0)")
    page.click("back")
    assert page.evaluate(where) == 0
    # Keys typed into a field do not step.
    page.evaluate("$('prompt').focus()")
    page.press("ArrowRight")
    assert page.evaluate(where) == 0


def test_blocks_and_settings_beyond_the_papers(page: Page) -> None:
    extra = {"eviction_delay": 2, "delay_steps": 0, "refresh_interval": 2, "suffix_window": 8}
    xargs = json.dumps({f"diffusion_{name}": value for name, value in extra.items()})
    ask(page, max_tokens="24", block_length="8", xargs=xargs)
    titles = "[...document.querySelectorAll('#tokens .block > small')].map((x) => x.textContent)"
    assert page.evaluate(titles) == ["block 1", "block 2", "block 3"]
    evicting = ["refresh", "cached", "evict", *["cached"] * 5]
    assert page.evaluate("shown.kinds") == [*evicting, "append", *["cached"] * 7, *evicting]
    for done, words in ((1, "filled the cache for block 1"), (3, "evicted"), (9, "appended")):
        page.evaluate(f"go({done})")
        assert words in page.evaluate("$('refresh').textContent")
    boxes = "[...document.querySelectorAll('#tokens .block')].map((x) => x.className)"
    assert page.evaluate(boxes) == ["block", "block now", "block"]
    assert page.problems == []


def test_no_cache_and_an_early_end(page: Page) -> None:
    answer = ask(page, policy="none", whole=False)
    trace = answer["choices"][0]["diffusion_trace"]
    assert trace["refreshes"] == [] and len(trace["steps"]) < 32
    assert page.evaluate("$('cache').hidden")
    assert set(page.evaluate("shown.kinds")) == {"full"}


def test_refusals_are_shown(page: Page, server: Server) -> None:
    """Refusals appear word for word, and disappear with the next good answer."""
    nobody = f"http://127.0.0.1:{free_port()}"
    for fields, words in (
        ({"keep_ratio": "2"}, "(HTTP 400): diffusion_keep_ratio must be"),
        ({"keep_ratio": "", "threshold": "0"}, "(HTTP 400): diffusion_threshold must be"),
        ({"threshold": "", "xargs": '{"diffusion_what": 1}'}, "diffusion_what"),
        ({"xargs": "{1}"}, "Further vllm_xargs are not JSON"),
        ({"xargs": "", "model": "<b>other</b>"}, "(HTTP 404): The model `<b>other</b>`"),
        ({"model": "tiny", "server": nobody}, f"{nobody} does not answer"),
        ({}, "--allowed-origins '[\"null\"]'"),
    ):
        assert words in refusal(page, **fields)
        assert page.evaluate("$('answer').hidden")
    ask(page, server=str(server.client.base_url) + "/")
    assert page.evaluate("$('error').hidden && !$('answer').hidden")


EVIL = '<img src=x onerror="globalThis.harmed = true"><b>bold</b>'


def test_text_is_no_markup(page: Page, tmp_path: Path) -> None:
    """Text from a model, a prompt or the name of a saved file is never interpreted as HTML."""
    trace = {"nfe": 2, "steps": [1, 0], "confidences": [0.5, 0.25]}
    trace["refreshes"] = [{"step": 0, "kind": "refresh", "block": [2, 4], "kept": [[0], [1]]}]
    tokens = [{"token": EVIL}, {"token": "</span>"}]
    answer = {"choices": [{"diffusion_trace": trace, "logprobs": {"content": tokens}}]}
    answer |= {"prompt_token_ids": [1, 2], "prompt_tokens": [EVIL, "&lt;"]}
    opened(page, tmp_path / "answer.json", answer)
    page.evaluate("go(2)")
    assert page.evaluate("document.querySelector('img, b:not(.legend b)')") is None
    assert [cell[1] for cell in page.evaluate(TOKENS)] == [EVIL, "</span>"]
    assert page.evaluate("$('prompt_tokens').textContent") == EVIL + "&lt;"
    opened(page, tmp_path / "<img src=x>.json", "{")
    assert "<img src=x>.json cannot be shown" in page.evaluate("$('error').textContent")
    assert page.evaluate("globalThis.harmed") is None
    assert page.problems == []


def test_saved_answers(page: Page, server: Server, tmp_path: Path) -> None:
    """Completions are shown with choices and given tokens, without texts; bad files are refused."""
    canvas = [5, 77, 5, 5, 311, 5, 5, 5]
    body = {"prompt": [77, 311, 45], "max_tokens": 8, "n": 2, "ignore_eos": True, "seed": 1}
    body |= {"temperature": 2.0, "return_token_ids": True}
    extra = {"diffusion_trace": 1, "diffusion_canvas": canvas}
    answer = server.answer("completions", **body, vllm_xargs=extra)
    opened(page, tmp_path / "answer.json", answer)
    assert page.evaluate("shown.promptLength") == 3
    states = [cell[:3:2] for cell in page.evaluate(TOKENS)]
    assert [i for i, state in enumerate(states) if state == ["", "given"]] == [1, 4]
    for index in "01":
        page.evaluate(f"$('choice').value = {index}")
        page.evaluate("$('choice').dispatchEvent(new Event('change')), go(99)")
        own = answer["choices"][int(index)]["token_ids"]
        assert [cell[1] for cell in page.evaluate(TOKENS)] == [str(token) for token in own]
    for content, words in (
        ({"choices": [{}]}, "no choices[0].diffusion_trace"),
        ({}, "no choices[0].diffusion_trace"),
        ("nothing", "answer.json cannot be shown"),
    ):
        page.evaluate("$('file').value = ''")
        opened(page, tmp_path / "answer.json", content)
        assert words in page.evaluate("$('error').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1600])
def test_it_fits_and_can_be_read(page: Page, tmp_path: Path, width: int, scheme: str) -> None:
    """Nothing overflows sideways, and text has enough contrast (WCAG's 4.5 : 1)."""
    steps = [*range(20)]
    trace = {"nfe": 20, "steps": steps, "confidences": [i / 19 for i in steps]}
    kept = [[i for i in range(300) if i % 7 > layer] for layer in range(4)]
    trace["refreshes"] = [{"step": 0, "kind": "refresh", "block": [300, 320], "kept": kept}]
    tokens = [{"token": " word" * (i % 3 + 1) + "x" * (60 if i == 7 else 0)} for i in steps]
    answer = {"choices": [{"diffusion_trace": trace, "logprobs": {"content": tokens}}]}
    answer |= {"prompt_token_ids": [1] * 300, "prompt_tokens": [" long" * 3] * 300}
    page.resize(width, 800)
    page.prefer(scheme)
    opened(page, tmp_path / "answer.json", answer)
    page.evaluate("go(20)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    lowest = page.evaluate(
        """(() => {
            const paint = document.createElement("canvas").getContext("2d");
            const light = (colour) => {
                paint.fillStyle = colour;
                paint.fillRect(0, 0, 1, 1);
                const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map((value) => {
                    const part = value / 255;
                    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
                });
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const contrast = (element) => {
                let behind = element;
                while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") {
                    behind = behind.parentElement;
                }
                const pair = [getComputedStyle(element).color,
                    getComputedStyle(behind).backgroundColor].map(light).sort((a, b) => b - a);
                return (pair[0] + 0.05) / (pair[1] + 0.05);
            };
            return Math.min(...[...document.querySelectorAll(
                "h1, h2, p, .legend span, button:not(:disabled), .token > *, label > span, " +
                "#prompt_tokens > *"
            )].filter((element) => element.checkVisibility()).map(contrast));
        })()"""
    )
    assert lowest >= 4.5
    assert page.problems == []
