"""A mock of the part of Hugging Face's API that publishing and reading a repository need; run it as a process.

It prints its port, then a line for each request. A repository is a list of commits, each a dict of files. It lacks LFS
and Xet storage (every file has to be in the commit itself), branches, users and the hub's own checks.
"""

import base64
import hashlib
import http.server
import json
import re
from urllib.parse import parse_qs

repositories = {}


def oid(content):
    return hashlib.sha1(content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.handle_request({})

    do_HEAD = do_GET

    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.handle_request(body)

    def handle_request(self, body):
        print(self.command, self.path, self.headers.get("Authorization", "-"), flush=True)
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.file(*found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|tree|paths-info|revision)/.*", path):
            self.repository(*found.groups(), body)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            self.repository(found[1], "revision", body)
        elif re.fullmatch(
            r"/api/models/[^/]+", path
        ):  # huggingface_hub 0 also looks for a repository without organisation
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        else:
            self.answer({"error": f"not mocked: {path}"}, 404)

    def create(self, wanted):
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        exists = name in repositories
        repositories.setdefault(name, [{}])
        self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name}, 409 if exists else 200)

    def repository(self, name, action, body):
        if name not in repositories:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        commits = repositories[name]
        files = commits[-1]
        head = oid(json.dumps([sorted(commit) for commit in commits]).encode())
        rows = [
            {"type": "file", "path": path, "size": len(content), "oid": oid(content)} for path, content in files.items()
        ]
        if action == "revision":
            siblings = [{"rfilename": path} for path in files]
            self.answer({"id": name, "sha": head, "private": False, "tags": [], "siblings": siblings})
        elif action == "preupload":
            asked = json.loads(body)["files"]
            regular = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.answer({"files": [{"path": file["path"], **regular} for file in asked]})
        elif action == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            if lines[0]["value"].get("parentCommit", head) != head:
                self.answer({"error": "A commit has happened since. Please refresh and try again."}, 412)
                return
            new = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commits.append(files | new)
            url = f"http://{self.headers['Host']}/{name}/commit/{head}"
            self.answer({"commitUrl": url, "commitOid": head, "hookOutput": "", "success": True})
        elif action == "tree":
            self.answer(rows)
        else:
            # huggingface_hub 0 sends a form, later ones JSON.
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self.answer([row for row in rows if row["path"] in wanted])

    def file(self, name, path):
        content = repositories.get(name, [{}])[-1].get(path)
        if content is None:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return
        status, total = 200, len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2]) + 1, total)
            status, content = 206, content[start:end]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def answer(self, document, status=200, **headers):
        content = json.dumps(document).encode()
        self.send_response(status)
        for key, value in {"Content_Type": "application/json", "Content_Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
