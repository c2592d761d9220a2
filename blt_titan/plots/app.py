"""The web application: pages and figures of one folder, read only, for this machine alone.

    GET /                          all figures on one page
    GET /api/visualizations        what there is: name, kind, title, url
    GET /visualizations/NAME       one figure: curves, scaling, a histogram, or a page that lies in the folder
    GET /images/NAME               an image
    GET /data/NAME                 data as it lies there (.json, .jsonl), or of a figure: curves, scaling

Pages that lie in the folder may run scripts of their own, so they are shut off: they can read nothing else here, and
foreign pages can embed nothing from here. A request by another name than this machine's own is refused, as one that a
foreign page was made to send.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from blt_titan.plots.runs import CURVES, DATA, IMAGES, PAGES, SCALING, RunsFolder

HOSTS = ["127.0.0.1", "localhost", "[::1]"]
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; frame-src 'self'; frame-ancestors 'self'; base-uri 'none'; "
        "form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# An origin of its own: a script in there reads no answer of this server.
_SHUT_OFF = {**_HEADERS, "Content-Security-Policy": "sandbox allow-scripts; " + _HEADERS["Content-Security-Policy"]}
_TEMPLATE = Path(__file__).with_name("page.html")


def make_app(root: Path) -> Starlette:
    """Return the application that shows a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    runs = RunsFolder(root)

    # Not async: they read files, and Starlette runs them in threads.
    def home(request: Request) -> Response:
        return _page("All runs", runs, runs.figures())

    def listing(request: Request) -> Response:
        return JSONResponse([figure._asdict() for figure in runs.figures()], headers=_HEADERS)

    def visualization(request: Request) -> Response:
        name = request.path_params["name"]
        if (path := runs.find(name, PAGES)) is not None:
            return FileResponse(path, media_type="text/html; charset=utf-8", headers=_SHUT_OFF)
        chosen = [f for f in runs.figures() if f.name == name and f.kind in ("curves", "scaling", "lengths")]
        if not chosen:
            raise _missing(name)
        return _page(chosen[0].title, runs, chosen)

    def image(request: Request) -> Response:
        return _file(runs, request.path_params["name"], IMAGES, _SHUT_OFF)

    def data(request: Request) -> Response:
        name = request.path_params["name"]
        if name in (CURVES, SCALING):
            return JSONResponse(runs.curves() if name == CURVES else runs.scaling(), headers=_HEADERS)
        return _file(runs, name, DATA)

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=_HEADERS)

    return Starlette(
        routes=[
            Route("/", home),
            Route("/api/visualizations", listing),
            Route("/visualizations/{name:path}", visualization),
            Route("/images/{name:path}", image),
            Route("/data/{name:path}", data),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)],
        exception_handlers={HTTPException: failed},
    )


def _file(runs: RunsFolder, name: str, suffixes: tuple[str, ...], headers: Mapping[str, str] = _HEADERS) -> Response:
    path = runs.find(name, suffixes)
    if path is None:
        raise _missing(name)
    return FileResponse(path, headers=headers)


def _missing(name: str) -> HTTPException:
    return HTTPException(404, f"{name}: there is no such figure in this folder")


def _page(title: str, runs: RunsFolder, figures: list[Any]) -> Response:
    shown: list[dict[str, Any]] = []
    for figure in figures:
        content = {
            "curves": runs.curves,
            "scaling": runs.scaling,
            "lengths": lambda name=figure.name: runs.lengths(name),
        }.get(figure.kind, lambda: None)()
        if figure.kind == "lengths" and content is None:
            continue
        shown.append({**figure._asdict(), "data": content})
    # Nothing of a name can end the script element, or be taken for markup: the page writes text nodes.
    script = json.dumps({"title": title, "figures": shown}).replace("<", "\\u003c")
    return HTMLResponse(_TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", script), headers=_HEADERS)
