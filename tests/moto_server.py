"""An S3-compatible server for tests: moto, one request at a time (its conditional puts are only right that way).

usage: moto_server.py PORT
"""

import sys

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, run_simple


class KeepAlive(WSGIRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_request(self, code="-", size="-"):
        pass


if __name__ == "__main__":
    app = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", int(sys.argv[1]), app, threaded=False, request_handler=KeepAlive)
