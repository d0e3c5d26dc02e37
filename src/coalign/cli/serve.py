"""The command that serves a search page: serve."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from coalign.errors import UserError


def serve_command(
    indexes: Positional[tuple[Path, ...]],
    port: int = 7860,
    host: str = "127.0.0.1",
    token: str | None = None,
    device: str | None = None,
) -> None:
    """Serve a search page and a REST API for indexed images, on this machine or, with a token, on the network.

    Example: coalign serve shelf

    Args:
        indexes: one or more folders written by `coalign index`
        port: port to listen on; 0 takes a free one
        host: address to listen on; any but this machine's own needs a token
        token: secret that visitors need: at least 12 characters, or auto to generate one; None: no token
        device: cpu, cuda, cuda:N or mps; None: the best there is
    """
    try:
        import python_multipart  # noqa: F401 (starlette imports it at the first form)

        from coalign.serve.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "pydantic", "python_multipart"):
            raise
        raise UserError('The server needs the extra "serve": pip install "coalign[serve]".') from None
    from coalign.devices import device_line
    from coalign.workflows.collection.index_files import read_info
    from coalign.workflows.collection.query import Collection, open_collection
    from coalign.workflows.evaluate.eval_model import device_for

    if not indexes:
        raise UserError("There is nothing to serve; give a folder written by `coalign index`.")

    def open_all() -> list[Collection]:
        for each in sorted({device_for(read_info(index).model, device) for index in indexes}):
            print(device_line(each), flush=True)
        collections = []
        for index in indexes:
            print(f"Opening {index}", flush=True)
            collections.append(open_collection(index, device))
        return collections

    serve(open_all, host, port, token)
