"""The web server of a study: the page under a secret link, sheets out, votes in.

Every address starts with the study's token; without it there is nothing to see. A vote is acknowledged when it is on the disk.
"""

import contextlib
import hmac
import json
import pathlib
import re
import socket

from motif_jax.bench import study as plan
from motif_jax.bench.ballots import Ballots, Taken
from motif_jax.bench.votes import check_annotator, check_record
from motif_jax.errors import UserError

MAX_BODY = 16 * 1024  # bytes; the longest vote that `check_record` passes, every character escaped, is smaller
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",  # the address holds the token
    "x-content-type-options": "nosniff",
    "x-robots-tag": "noindex",
}


def application(study: pathlib.Path, ballots: Ballots, token: str):
    """The Starlette app: GET <token>/... is the page, POST <token>/claim and <token>/vote take JSON objects.

    claim {"annotator"} -> {"sheet", "tasks", "done", "trained"}, and "later" where sheet is null (see `Ballots.claim`);
    vote {a record, see `votes.check_record`} -> {"stored": true}.
    400: not such an object, 403: no token, 409: somebody else has the task, 413: too long. Its shutdown closes the ballots.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    key = ballots.key

    def takes_json(answer):
        async def endpoint(request: Request) -> Response:
            data = b""
            async for chunk in request.stream():
                data += chunk
                if len(data) > MAX_BODY:
                    return JSONResponse({"error": f"longer than {MAX_BODY} bytes"}, 413)
            try:
                return JSONResponse(await run_in_threadpool(answer, json.loads(data)))
            except (ValueError, RecursionError, Taken) as error:
                return JSONResponse({"error": str(error)}, 409 if isinstance(error, Taken) else 400)

        return endpoint

    def claim(found) -> dict:
        claimed = ballots.claim(check_annotator(found.get("annotator") if isinstance(found, dict) else None))
        tasks = [plan.page_task(key, t) for t in key.sheets[claimed["sheet"]]] if claimed["sheet"] else []
        return claimed | {"tasks": tasks}

    def vote(found) -> dict:
        ballots.vote(check_record(found, key))
        return {"stored": True}

    script = plan.script(plan.page_data(key, server=True))
    pages = [
        Route("/claim", takes_json(claim), methods=["POST"]),
        Route("/vote", takes_json(vote), methods=["POST"]),
        Route("/study.js", lambda request: Response(script, media_type="text/javascript")),
        Mount("/", StaticFiles(directory=study / "page", html=True)),
    ]

    def guarded(app):
        """Refuses whatever does not start with the token, and adds the headers."""

        async def guard(scope, receive, send) -> None:
            async def send_with_headers(message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
                await send(message)

            given = scope.get("path", "").removeprefix("/").partition("/")[0]  # the server's start and end have none
            known = scope["type"] == "lifespan" or hmac.compare_digest(given.encode(), token.encode())
            await (app if known else PlainTextResponse("This address needs the study's token.", 403))(scope, receive, send_with_headers)

        return guard

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        ballots.close()

    return Starlette(routes=[Mount(f"/{token}", routes=pages)], middleware=[Middleware(guarded)], lifespan=lifespan)


def serve(study: pathlib.Path, votes: pathlib.Path, host: str, port: int, token: str | None, lease: float) -> None:
    """Runs until it is stopped. Raises UserError when it cannot start."""
    try:
        import uvicorn
    except ImportError as error:
        raise UserError("annotate serve needs starlette and uvicorn: pip install -e '.[annotate]'") from error

    key = plan.load(study)
    if not (page := study / "page" / "index.html").is_file():
        raise UserError(f"{page}: missing; `annotate build` puts it there, beside key.json")
    ballots = Ballots(votes, key, lease)
    token = token or ballots.token
    if not re.fullmatch(r"[A-Za-z0-9_-]{8,200}", token):
        raise UserError("--token: expected 8 to 200 letters, digits, - and _")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host={host} --port={port}: cannot listen there ({error})") from error
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listener.getsockname()[1]}/{token}/", flush=True)
    print(ballots.progress(), flush=True)
    # Neither the log nor a header tells the token or what runs here.
    config = uvicorn.Config(application(study, ballots, token), log_level="warning", access_log=False, server_header=False)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
