"""The web application: pages and figures of one folder, read only, for this machine alone.

    GET /                          all figures on one page
    GET /api/visualizations        what there is: name, kind, title, url
    GET /visualizations/NAME       one figure: curves, scaling, a histogram, or a page that lies in the folder
    GET /images/NAME               an image
    GET /data/NAME                 data as it lies there (.json, .jsonl), or of a figure: curves, scaling

What could not be read stands in notes above the figures.

Pages that lie in the folder may run scripts of their own, so they are shut off: they can read nothing else here, and
foreign pages can embed nothing from here. A request by another name than this machine's own is refused, as one that a
foreign page was made to send.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from blt_titan.plots.figures import CURVES, DATA, IMAGES, PAGES, SCALING, Figure, RunsFolder, Seen, shown

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
        seen = runs.look()
        return _page("All runs", seen, seen.figures)

    def listing(request: Request) -> Response:
        return _json([figure.listed() for figure in runs.look().figures])

    def visualization(request: Request) -> Response:
        name = _name(request)
        if (path := runs.find(name, PAGES)) is not None:
            return FileResponse(path, media_type="text/html; charset=utf-8", headers=_SHUT_OFF)
        seen = runs.look()
        chosen = [f for f in seen.figures if f.name == shown(name) and f.kind in ("curves", "scaling", "lengths")]
        if not chosen:
            raise _missing(name)
        return _page(chosen[0].title, seen, chosen)

    def image(request: Request) -> Response:
        return _file(runs, _name(request), IMAGES, _SHUT_OFF)

    def data(request: Request) -> Response:
        name = _name(request)
        if name in (CURVES, SCALING):
            seen = runs.look()
            return _json(seen.curves if name == CURVES else seen.scaling)
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


def _name(request: Request) -> str:
    """Return the name in a request's path, of whatever bytes a file's name may have."""
    # Decoded as UTF-8, the path itself would have lost them.
    return os.fsdecode(unquote_to_bytes(request.scope["raw_path"])).split("/", 2)[2]


def _file(runs: RunsFolder, name: str, suffixes: tuple[str, ...], headers: Mapping[str, str] = _HEADERS) -> Response:
    path = runs.find(name, suffixes)
    if path is None:
        raise _missing(name)
    return FileResponse(path, headers=headers)


def _missing(name: str) -> HTTPException:
    return HTTPException(404, f"{shown(name)}: there is no such figure in this folder")


def _json(content: Any) -> Response:
    return Response(json.dumps(content, allow_nan=False), media_type="application/json", headers=_HEADERS)


def _page(title: str, seen: Seen, figures: list[Figure]) -> Response:
    content = {
        "title": title,
        # In one order on every page: a run's color follows from its place.
        "runs": [run["run"] for run in seen.curves],
        "notes": seen.notes,
        "figures": [figure._asdict() for figure in figures],
    }
    # Nothing of a name can end the script element, or be taken for markup: the page writes text nodes.
    script = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    return HTMLResponse(_TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", script), headers=_HEADERS)
