"""Drives a page in QtWebEngine (Chromium) without a screen: `python browser.py PAGE SCREENSHOT`.

Prints what it saw as JSON. A process of its own, for a browser engine does not share one gladly.
"""

# pyright: basic, reportMissingImports=false
# (PySide6 is an optional dependency of the tests)

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu")

from PySide6.QtCore import QEventLoop, QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInterceptor
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

SECONDS = 60_000
SIZES = """JSON.stringify([...document.querySelectorAll('section')].map(s => ({id: s.id, shown: s.offsetHeight > 0,
  parts: [...s.querySelectorAll('svg,table,.fact,#axis')].map(e => {
    const b = e.getBoundingClientRect(); return {id: e.id, width: b.width, height: b.height,
      shapes: e.querySelectorAll('rect,circle,polygon,polyline').length}})})))"""
ZOOM = """(() => { const s = document.getElementById('timeline'), b = s.getBoundingClientRect();
  const before = document.getElementById('axis').textContent;
  s.dispatchEvent(new WheelEvent('wheel', {deltaY: -100, clientX: b.left + b.width / 2, cancelable: true}));
  const zoomed = document.getElementById('axis').textContent, inside = s.getAttribute('viewBox');
  s.dispatchEvent(new MouseEvent('dblclick', {bubbles: true}));
  return JSON.stringify({before, zoomed, inside, again: document.getElementById('axis').textContent}); })()"""
SORT = """(() => { const t = document.getElementById('operations'), h = t.querySelectorAll('th')[1];
  const number = r => parseFloat(r.children[1].textContent.replace(/,/g, ''));
  const column = () => [...t.querySelectorAll('tr')].slice(1).map(number);
  h.click(); const down = column(); h.click(); return JSON.stringify({down, up: column()}); })()"""


class Requests(QWebEngineUrlRequestInterceptor):
    """Every address that the page asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def interceptRequest(self, info: Any) -> None:
        self.urls.append(info.requestUrl().toString())


class Page(QWebEnginePage):
    """Keeps what the page writes to the console, errors of scripts included."""

    def __init__(self, profile: QWebEngineProfile) -> None:
        super().__init__(profile, None)
        self.console: list[str] = []

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
        self.console.append(f"{level.name} line {line}: {message}")


def main(path: Path, screenshot: Path) -> dict[str, Any]:
    """Load the page, look at every view, zoom and sort."""
    _application = QApplication([])  # kept alive
    requests, view = Requests(), QWebEngineView()
    profile = QWebEngineProfile()
    profile.setUrlRequestInterceptor(requests)
    page = Page(profile)
    view.setPage(page)
    view.resize(1280, 1000)
    view.show()

    def until(start: Any) -> Any:
        """Run the event loop until the callback that `start` is given has been called."""
        loop, found = QEventLoop(), []
        start(lambda value: (found.append(value), loop.quit()))
        QTimer.singleShot(SECONDS, loop.quit)
        if not found:
            loop.exec()
        if not found:
            raise TimeoutError("the browser did not answer")
        return found[0]

    def script(code: str) -> Any:
        return until(lambda done: page.runJavaScript(code, 0, done))

    def load(done: Any) -> None:
        page.loadFinished.connect(done)
        page.load(QUrl.fromLocalFile(str(path)))

    report: dict[str, Any] = {"loaded": until(load), "views": {}}
    names = json.loads(script("JSON.stringify([...document.querySelectorAll('nav button')].map(b => b.dataset.view))"))
    for name in names:
        script(f"document.querySelector('nav button[data-view={name}]').click()")
        report["views"][name] = json.loads(script(SIZES))
        if name == "timeline":
            report["zoom"] = json.loads(script(ZOOM))
        if name == "operations":
            report["sort"] = json.loads(script(SORT))
    script(f"document.querySelector('nav button[data-view={names[0]}]').click()")
    until(lambda done: QTimer.singleShot(800, lambda: done(True)))  # until it is drawn
    image = view.grab().toImage()
    image.save(str(screenshot))
    points = ((x, y) for x in range(0, image.width(), 7) for y in range(0, image.height(), 7))
    report["colours"] = len({image.pixel(x, y) for x, y in points})
    report["console"], report["requests"] = page.console, requests.urls
    return report


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))) + "\n")
    sys.stdout.flush()
    os._exit(0)  # without Qt's teardown, whose order Python does not keep
