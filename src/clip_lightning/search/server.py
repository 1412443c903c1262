"""Serving the page in threads: Gradio's server with what it would otherwise decide by itself."""

from __future__ import annotations

import logging

import gradio as gr
from starlette.middleware import Middleware

from clip_lightning.errors import UserError
from clip_lightning.search.page import CSS, THEME

LARGEST_UPLOAD = "20mb"


def launch(page: gr.Blocks, guard: Middleware, host: str, port: int | None) -> str:
    """Serve the page and return its URL.

    Args:
        page: of `build_page`.
        guard: which requests pass first.
        host: address to listen at.
        port: 7860 or the next one that is free if None.

    Raises:
        UserError: the port is taken, or none is free.
    """
    try:
        _, url, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
            run_history=False,
            footer_links=["api"],
            max_file_size=LARGEST_UPLOAD,
            root_path="",
            app_kwargs={"middleware": [guard]},
            theme=THEME,
            css_paths=CSS,
        )
    except OSError as error:
        taken = f"--port {port} is taken" if port else "the ports from 7860 on are taken"
        raise UserError(f"{taken} at {host}; give another --port") from error
    return url


def close(page: gr.Blocks) -> None:
    """End the server, if it was started; a page that is open somewhere holds it for a second at most."""
    if page.is_running:
        # what is cut off then is no news
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        page.server.config.timeout_graceful_shutdown = 1
        page.close(verbose=False)
