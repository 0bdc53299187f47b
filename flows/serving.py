"""Prefect's own command, whose UI calls nothing out: `python -m flows.serving server start …`.

Whatever the settings say, every page of the newer UI asks Amplitude for something, and the page of blocks in the other
has pictures from elsewhere. So the newer one is not served, and browsers are told to ask this server alone.
"""

import os
from pathlib import Path

import prefect
import prefect.server.api.server
from fastapi import FastAPI
from prefect.cli import app
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
_create_ui_app = prefect.server.api.server.create_ui_app


class _TellsWhomToAsk:
    """Sends the policy with every page."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _create_guarded_ui_app(ephemeral: bool) -> FastAPI:
    ui = _create_ui_app(ephemeral)
    ui.add_middleware(_TellsWhomToAsk)
    return ui


# A UI whose files are not there is not served.
prefect.__ui_v2_static_path__ = Path(os.devnull, "none")
prefect.server.api.server.create_ui_app = _create_guarded_ui_app

if __name__ == "__main__":
    app()
