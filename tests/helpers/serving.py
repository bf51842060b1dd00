"""A web server of a folder, which counts what it is asked for, and can serve badly."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves `folder` at `url`; `asked` counts files by their name; `fault` is None, "cut" or "stalled": no file is whole."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.asked, self.fault = folder, Counter(), None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_) -> None:
        """Whoever asked is gone."""


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, request, address, server: Server) -> None:
        super().__init__(request, address, server, directory=str(server.folder))

    def do_GET(self) -> None:
        if "Method" not in self.headers:  # else torchvision asks where it is, and reads nothing
            self.server.asked[self.path.lstrip("/")] += 1
        super().do_GET()

    def copyfile(self, source, outputfile) -> None:
        if self.server.fault is None:
            return super().copyfile(source, outputfile)
        outputfile.write(source.read(100))
        outputfile.flush()
        return time.sleep(1) if self.server.fault == "stalled" else None

    def log_message(self, *_) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """A `Server` of `folder`, until the end."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
