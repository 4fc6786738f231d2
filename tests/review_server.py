"""`mpo review` in a thread or as a process of its own, and requests to it."""

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import uuid

from support import make_image


def pairs(folder, count=6, name="pairs.jsonl", **more):
    """A file of MMPR pairs with images; pair k counts k dots, and its rejected completion one more."""
    lines = []
    for number in range(count):
        if number < 3:
            make_image(number).save(folder / f"{number}.png")
        line = {"id": f"p{number}", "image": f"{number % 3}.png", "question": f"How many in {number}?", "source": f"s{number % 2}"}
        lines.append(
            {**line, "chosen": f"There are {number}.", "rejected": f"There are {number + 1}.", "answer_gt": str(number), **more}
        )
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Reviewing:
    """A server in a thread of this process; `links` by reviewer."""

    def __init__(self, path, *, reviewers=("anna",), **settings):
        from mpo.review.server import Review, Server

        self.review = Review(path, reviewers=reviewers, **settings)
        self.server = Server(self.review)
        self.links = self.server.links()
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.server.should_exit = True
        self.thread.join(20)

    def ask(self, path, body=None, *, by="anna", **headers):
        """The status and the JSON (or bytes) of an answer."""
        address, token = self.links[by].split("/#")
        own = {"Authorization": f"Bearer {token}"} | (
            {"Content-Type": "application/json", "Origin": address} if body is not None else {}
        )
        own = {name: value for name, value in {**own, **headers}.items() if value is not None}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(address + path, data, own), timeout=30) as answer:
                status, given = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, given = error.code, error.read()
        try:
            return status, json.loads(given)
        except ValueError:
            return status, given

    def decide(self, place, action, *, by="anna", **more):
        """Decide on a record as the page does: after reading it."""
        _, view = self.ask(f"/api/records/{place}", by=by)
        own = {
            "place": place,
            "action": action,
            "key": view["key"],
            "base": view["base"],
            "uid": uuid.uuid4().hex,
            "edits": [],
            **more,
        }
        return self.ask("/api/decide", own, by=by)


class Process(Reviewing):
    """A server as a process of its own, which `command` starts."""

    def __init__(self, *words, prefix=(), reviewers=("anna",), command=None, **settings):
        names = [word for name in reviewers for word in ("--reviewer", name)]
        command = command or [*prefix, sys.executable, "-m", "mpo", "review", *map(str, words), *names]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **settings)
        self.links, self.said = {}, ""
        for line in self.process.stderr:
            self.said += line
            if found := re.fullmatch(r"(\S+)\s+(http://\S+)\n", line):
                self.links[found[1]] = found[2]
            if len(self.links) == len(reviewers):
                break

    def __enter__(self):
        assert self.links, self.said
        return self

    def __exit__(self, *_):
        self.stop(signal.SIGINT)

    def stop(self, how=signal.SIGKILL):
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.process.wait(20)
        self.process.stderr.close()
