"""The server: who is let in, what is served, what is saved, and what a kill leaves."""

import json
import os
import random
import shutil
import socket
import subprocess
import threading
import time
import uuid
from pathlib import Path

import pytest
from review_server import Process, Reviewing, pairs
from support import make_image

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from mpo.commands import main
from mpo.data import load_preferences
from mpo.data.files import open_files
from mpo.data.shards import ArrayShard
from mpo.io import read_json_lines
from mpo.review.log import InUse, log_of, read_events
from mpo.review.review import Review


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    outside = tmp_path_factory.mktemp("outside")
    make_image(9).save(outside / "secret.png")
    path = pairs(folder)
    lines = path.read_text().splitlines()
    odd = {"question": "q", "chosen": "c", "rejected": "r"}
    (folder / "drawing.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    (folder / "link.png").symlink_to(outside / "secret.png")
    make_image(5).save(folder / "scan.tiff")
    for image in (
        str(outside / "secret.png"),
        "../outside/secret.png",
        "link.png",
        "drawing.png",
        "scan.tiff",
        "pairs.jsonl",
        "http://a/b.png",
    ):
        lines.append(json.dumps({**odd, "image": image}))
    lines.append(json.dumps({**odd, "image": {"bytes": "abc"}}))
    lines += ["[1, 2]", '{"question": "q"']
    path.write_text("\n".join(lines) + "\n")
    with Reviewing(path, reviewers=("anna", "ben", "eve")) as server:
        server.path = path
        yield server


def test_only_those_with_the_link_are_let_in(served):
    for header in (None, "Bearer no", "Basic x", "Bearer "):
        assert served.ask("/api/state", Authorization=header)[0] == 401
        assert served.ask("/api/images/0/image/0", Authorization=header)[0] == 401
    assert served.ask("/api/state")[1]["reviewer"] == "anna" and served.ask("/api/state", by="ben")[1]["reviewer"] == "ben"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "10.0.0.1:{port}", "localhost.evil.example:{port}", ""]
)
def test_other_names_of_this_machine_are_refused(served, host):
    port = served.links["anna"].split("/#")[0].rpartition(":")[2]
    assert served.ask("/api/state", Host=host.format(port=port))[0] in (400, 403)
    assert served.ask("/", Host=host.format(port=port))[0] in (400, 403)
    assert served.ask("/api/state", Host=f"localhost:{port}")[0] == 200


def test_other_pages_are_refused(served):
    _, view = served.ask("/api/records/0")
    body = {"place": 0, "action": "accept", "key": view["key"], "base": view["base"], "uid": uuid.uuid4().hex, "edits": []}
    for wrong in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": None}, {"Sec-Fetch-Site": "cross-site"}):
        assert served.ask("/api/decide", body, **wrong)[0] == 403
    assert served.ask("/api/decide", body, **{"Content-Type": "text/plain"})[0] == 415
    assert served.ask("/api/records/0")[1]["decision"] is None


def test_the_page_is_closed(served):
    import urllib.request

    address = served.links["anna"].split("/#")[0]
    for name in ("/", "/app.js", "/text.js", "/style.css"):
        with urllib.request.urlopen(address + name) as answer:
            text, headers = answer.read().decode(), answer.headers
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
            assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
            assert (
                "innerHTML" not in text
                and "http://" not in text.replace("http://www.w3.org/1998/Math/MathML", "")
                and "https://" not in text
            )
    for name in ("/app.py", "/..%2fserver.py", "/page/app.js", "/api", "/%2e%2e/server.py"):
        assert served.ask(name)[0] == 404


def test_images_are_those_of_records_inside_the_root(served):
    status, data = served.ask("/api/images/0/image/0")
    assert status == 200 and data[:4] == b"\x89PNG"
    assert served.ask("/api/images/10/image/0")[1][:4] == b"\x89PNG"  # converted from TIFF
    for place in (6, 7, 8, 9, 11, 12, 13):
        status, told = served.ask(f"/api/images/{place}/image/0")
        assert status == 404 and "error" in told, place
    for path in ("0/image/1", "0/video/0", "0/pairs/0", "99/image/0", "-1/image/0", "0/image/-1", "0/image/x"):
        assert served.ask(f"/api/images/{path}")[0] == 404, path


@pytest.mark.parametrize(
    ("headers", "status"), [({"Origin": "null"}, 403), ({"Authorization": ""}, 401), ({"Content-Type": "text/plain"}, 415)]
)
def test_a_refusal_reaches_a_client_that_is_still_sending(served, headers, status):
    address, token = served.links["anna"].split("/#")
    host = address.removeprefix("http://")
    own = {"Host": host, "Connection": "close", "Content-Length": 2**21, "Origin": address}
    own |= {"Authorization": f"Bearer {token}", "Content-Type": "application/json", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in own.items())
    name, port = host.split(":")
    with socket.create_connection((name, int(port)), 30) as client:
        client.sendall(f"POST /api/decide HTTP/1.1\r\n{head}\r\n".encode())
        time.sleep(0.1)  # an answer that did not wait would be sent, and the connection closed, here
        for _ in range(32):
            client.sendall(b" " * 2**16)
        assert client.recv(100).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400), (b"[]", 400), (b'{"a": 1, "a": 2}', 400), (b"\xff", 400), ({}, 400), ({"place": "0", "action": "accept"}, 400),
        ({"place": 0, "action": "drop"}, 400), ({"place": 0, "action": "accept", "uid": "x"}, 400), (b"[" * 5_000_000, 413),
        ({"place": 99, "action": "accept", "uid": "a" * 16}, 404), ({"place": -1, "action": "accept", "uid": "a" * 16}, 404),
        ({"place": 0, "action": "accept", "uid": "a" * 16, "base": "none"}, 409), ({"place": True, "action": "accept"}, 400),
    ],
)  # fmt: skip
def test_requests_are_bounded_and_checked(served, body, status):
    assert served.ask("/api/decide", body)[0] == status


def test_idle_connections_keep_nobody_out(served):
    """300 that never end their request: the page is still answered, and all but a bounded number of them are closed."""
    from mpo.review.server import CONNECTIONS

    address = served.server.socket.getsockname()
    idle = [socket.create_connection(address) for _ in range(300)]
    for number, one in enumerate(idle):
        if number % 3:
            one.sendall(b"GET / HTTP/1.1\r\nHost:")  # its second half does not come
        if number % 50 == 0:
            assert served.ask("/api/state")[0] == 200
    assert [served.ask(path)[0] for path in ("/", "/api/records/0", "/api/images/0/image/0")] == [200] * 3
    for one in idle:
        one.settimeout(0)
    closed = sum(is_closed(one) for one in idle)
    assert closed >= 300 - CONNECTIONS
    for one in idle:
        one.close()


def test_refused_requests_whose_rest_does_not_come_keep_nobody_out(served, monkeypatch):
    """300 of another page announce a body that they never send; all but a bounded number of them are closed."""
    from mpo.review import server

    monkeypatch.setattr(server, "UNREAD_SECONDS", 300)
    address = served.server.socket.getsockname()
    head = f"POST /api/decide HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nOrigin: null\r\nContent-Length: 9\r\n\r\n".encode()
    waiting = []
    for number in range(300):
        waiting.append(socket.create_connection(address))
        waiting[-1].sendall(head)
        if number % 50 == 0:
            assert served.ask("/api/state")[0] == 200
    assert [served.ask(path)[0] for path in ("/", "/api/records/0", "/api/images/0/image/0")] == [200] * 3
    for one in waiting:
        one.setblocking(False)
    assert sum(map(is_closed, waiting)) >= 300 - server.CONNECTIONS
    for one in waiting:
        one.close()


def is_closed(connection):
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_request_whose_bytes_drip_is_closed(served, monkeypatch):
    from mpo.review import server

    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    with socket.create_connection(served.server.socket.getsockname()) as first:
        whole = b"GET /style.css HTTP/1.1\r\nHost: localhost\r\n\r\n"
        first.sendall(whole)  # refused, as the port is missing; the connection stays
        assert first.recv(4096).startswith(b"HTTP/1.1 403")
        first.settimeout(0.05)
        for byte in b"GET / HTTP/1.1\r\nX: " + b"a" * 1000:
            try:
                first.sendall(bytes([byte]))
                if first.recv(4096) == b"":
                    return
            except TimeoutError:
                continue
            except OSError:
                return
    raise AssertionError("1,000 bytes dripped and nobody closed it")


def test_edits_are_of_what_can_be_edited(served):
    for edit in (
        {"paths": [["image"]], "value": "/etc/passwd"},
        {"paths": [["id"]], "value": "x"},
        {"paths": "x"},
        7,
        {"paths": [["chosen", 0]]},
    ):
        assert served.decide(1, "accept", edits=[edit])[0] == 400
    for value in (7, ["x"], None, "There are 2.", "", "\ud800"):  # the fourth equals the rejected one
        status, told = served.decide(1, "accept", edits=[{"paths": [["chosen"]], "value": value}])
        assert status == 422 and told["error"], value
    assert served.ask("/api/records/1")[1]["decision"] is None


def test_lines_that_are_no_records_can_be_rejected_alone(served):
    for place in (14, 15):
        assert served.ask(f"/api/records/{place}")[1]["bad"]
        assert served.decide(place, "accept")[0] == 422
        assert served.decide(place, "reject", reason="broken")[0] == 200


def test_a_stale_tab_is_told_and_overwrites_nothing(served):
    _, view = served.ask("/api/records/2")
    assert served.decide(2, "swap")[0] == 200
    body = {"place": 2, "action": "reject", "key": view["key"], "base": view["base"], "uid": uuid.uuid4().hex, "edits": []}
    status, told = served.ask("/api/decide", body)
    assert status == 409 and told["record"]["decision"]["action"] == "swap"
    undo = served.ask("/api/state")[1]["undo"]
    assert served.decide(3, "accept")[0] == 200
    assert served.ask("/api/undo", {"undoes": undo})[0] == 409
    assert served.ask("/api/undo", {"undoes": served.ask("/api/state")[1]["undo"]})[1]["place"] == 3


def test_reviewers_are_blind_until_they_decide_and_settle_what_they_differ_in(served):
    for by, action in (("anna", "accept"), ("ben", "reject")):
        assert served.ask("/api/records/4", by=by)[1]["others"] == []
        assert served.decide(4, action, by=by)[0] == 200
    blind = served.ask("/api/records/4", by="eve")[1]
    assert (blind["others"], blind["disagreeing"], blind["decision"], blind["settled"]) == ([], False, None, None)
    assert served.decide(4, "swap", by="eve", settle=True)[0] == 409
    seen = served.ask("/api/records/4", by="ben")[1]
    assert seen["disagreeing"] and [(one["by"], one["action"]) for one in seen["others"]] == [("anna", "accept")]
    import numpy as np

    queue = np.frombuffer(served.ask("/api/queue?state=disagreeing")[1], "<u4").tolist()
    assert queue == [4]
    assert served.ask("/api/queue?state=disagreeing", by="eve")[1] == b""  # not even that others differ
    told = served.ask("/api/report", by="eve")[1]
    assert told["reviewers"]["ben"] == {"decided": 1} and not (told["agreement"] or told["disagreements"])
    assert served.decide(4, "accept", by="ben", settle=True)[0] == 200
    assert not served.ask("/api/records/4", by="anna")[1]["disagreeing"]
    told = served.ask("/api/report", by="anna")[1]
    assert told["disagreements"] == 0 and "ben" not in told["position_bias"]
    assert told["rows"][-1] == ["to settle", "0 disagreements"] and ["ben", "1 decided"] in told["rows"]


def test_filters_orders_and_search(served):
    import numpy as np

    def queue(words):
        return np.frombuffer(served.ask(f"/api/queue?{words}", by="eve")[1], "<u4").tolist()

    assert queue("source=s1") == [1, 3, 5] and queue("source=none") == []
    assert queue("verdict=cannot%20be%20read") == [14, 15]
    assert queue("search=%5B1%2C") == [] and queue("search=how") == [*range(6)] and queue("search=%22id%22") == []
    assert queue("search=HOW%20MANY%20IN%203") == [3] and queue("search=chosen") == [] and queue("search=p4") == [4]
    assert sorted(queue("order=random")) == [*range(16)] == queue("") and queue("order=random") != [*range(16)]
    assert len(queue("state=unreviewed")) == 16 and queue("state=accept") == []
    assert served.ask("/api/queue?order=worst")[0] == 422


def test_the_left_side_is_random_and_noted(served):
    sides = [served.ask(f"/api/records/{place}", by=by)[1]["left"] for place in range(13) for by in ("anna", "ben", "eve")]
    assert 5 < sides.count("chosen") < 34
    view = served.ask("/api/records/5")[1]
    served.decide(5, "accept", hidden=True)
    event = read_events(log_of(served.path))[0][-1]
    assert (event["left"], event["hidden"]) == (view["left"], True)


def test_a_second_server_is_refused(served, capsys):
    assert main(["review", str(served.path)]) == 2
    assert "in use" in capsys.readouterr().err


def test_one_file_by_another_name_is_refused(tmp_path):
    """A hard link has a log of its own: two people would each correct half of one file."""
    path = pairs(tmp_path)
    names = [tmp_path / "hard.jsonl", tmp_path / "soft.jsonl"]
    os.link(path, names[0])
    names[1].symlink_to(path)
    with Reviewing(path) as server:
        for name in names:
            with pytest.raises(InUse):
                Review(name, reviewers=["ben"])
        path.write_bytes(path.read_bytes() + b"\n")
        assert server.ask("/api/reload", {})[0] == 200
        with pytest.raises(InUse):
            Review(names[0], reviewers=["ben"])
        assert not log_of(names[0]).exists()
    with Reviewing(names[0]):
        pass


def test_a_change_of_the_same_size_and_time_is_noticed(tmp_path):
    path = pairs(tmp_path)
    with Reviewing(path) as server:
        before = path.stat()
        path.write_text(path.read_text().replace("There are 3.", "There are 9."))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size and server.ask("/api/records/1")[0] == 409


def test_a_decision_is_not_taken_for_another_with_its_uid(tmp_path):
    with Reviewing(pairs(tmp_path), reviewers=("anna", "ben")) as server:
        for by, action, status in (("anna", "accept", 200), ("anna", "reject", 409), ("ben", "accept", 409)):
            assert server.decide(0, action, by=by, uid="a" * 16)[0] == status
        assert server.ask("/api/records/0", by="ben")[1]["decision"] is None


def test_a_changed_file_is_noticed_and_decisions_follow(tmp_path):
    path = pairs(tmp_path)
    with Reviewing(path) as server:
        assert server.decide(2, "reject")[0] == 200
        os.utime(path, (1, 1))
        assert server.ask("/api/records/1")[0] == 200  # another time alone
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*lines[1:], lines[0]]))
        status, told = server.ask("/api/records/2")
        assert status == 409 and told["changed"]
        before = log_of(path).read_bytes()
        assert server.ask("/api/decide", {"place": 1, "action": "accept", "uid": "a" * 16, "key": "", "base": ""})[0] == 409
        assert log_of(path).read_bytes() == before
        assert server.ask("/api/reload", {})[0] == 200
        assert server.ask("/api/records/1")[1]["decision"]["action"] == "reject"
        assert server.ask("/api/records/2")[1]["decision"] is None


def test_lines_with_fields_of_other_types_are_named_and_keep_nothing_back(tmp_path):
    """They can be rejected, and when the file changes the decisions on them and on others follow."""
    odd = [{"completions": {"response": 5}, "prompt": "q"}, {"messages": 5, "rejected_response": "r"}, {"text": "{", "image": "x"}]
    path = pairs(tmp_path, 2)
    path.write_text("".join(json.dumps(line) + "\n" for line in odd) + path.read_text())
    with Reviewing(path) as server:
        for place in range(3):
            assert server.ask(f"/api/records/{place}")[1]["bad"] and server.decide(place, "accept")[0] == 422
            assert server.decide(place, "reject")[0] == 200
        assert server.decide(3, "swap")[0] == 200
        assert server.ask("/api/queue?search=how")[0] == server.ask("/api/queue?verdict=x")[0] == 200
    path.write_text('{"id": "new"}\n' + path.read_text())
    with Reviewing(path) as server:
        found = [server.ask(f"/api/records/{place}")[1]["decision"] for place in range(5)]
        assert [one and one["action"] for one in found] == [None, "reject", "reject", "reject", "swap"]


def test_a_file_that_could_not_be_opened_can_be_opened_anew(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("mpo.review.review.opened", full)
        server = Reviewing(pairs(tmp_path))
        assert server.ask("/api/queue")[0] == 409
    with server:
        assert server.ask("/api/reload", {})[0] == 200 and server.decide(1, "accept")[0] == 200


def test_kill_at_any_moment_loses_nothing_that_was_said_to_be_saved(tmp_path):
    """Twice a server is killed while two reviewers decide; all that was answered 200 is in the log, once."""
    path, saved, rng = pairs(tmp_path, 80), {}, random.Random(1)
    for kill in range(2):
        server = Process(path, reviewers=("anna", "ben"))
        server.__enter__()

        def work(by, server=server, kill=kill):
            for place in range(40 * kill, 40 * kill + 40):
                uid = uuid.uuid4().hex
                try:
                    status, _ = server.decide(place, "reject", by=by, uid=uid, reason="r" * rng.randrange(1000))
                except OSError:
                    return
                if status == 200:
                    saved[uid] = (by, place)

        threads = [threading.Thread(target=work, args=(by,)) for by in ("anna", "ben")]
        for thread in threads:
            thread.start()
        wanted = len(saved) + rng.randrange(1, 12)
        while len(saved) < wanted and any(thread.is_alive() for thread in threads):
            time.sleep(0.001)
        server.stop()
        for thread in threads:
            thread.join()
    events = {event["uid"]: event for event in read_events(log_of(path))[0]}
    assert saved and all((events[uid]["by"], events[uid]["place"]) == told for uid, told in saved.items())


def test_a_full_disk_is_said_and_nothing_is_marked_as_saved(tmp_path):
    """A file system of 64 KiB: the page is told, the log stays whole, and saves again when there is room."""
    space = ["unshare", "--map-root-user", "--mount"] if shutil.which("unshare") else ["false"]
    if subprocess.run([*space, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system of their own")
    path = pairs(tmp_path, 2)
    script = 'mount -t tmpfs -o size=64k none "$0" && cp "$0.kept" "$0/pairs.jsonl"'
    script += ' && head -c 48k /dev/zero > "$0/full" && exec "$@"'
    disk = tmp_path / "disk"
    disk.mkdir()
    path.rename(tmp_path / "disk.kept")
    prefix = [*space, "sh", "-c", script, str(disk)]
    with Process(disk / "pairs.jsonl", prefix=prefix) as server:
        root = Path(f"/proc/{server.process.pid}/root{disk}")
        answers = [server.decide(0, action, reason="r" * 2000, edits=[]) for action in ("reject", "skip") * 6]
        status, told = next(one for one in answers if one[0] != 200)
        assert status == 507 and told["unsaved"]
        good = sum(one[0] == 200 for one in answers)
        assert len(read_events(log_of(root / "pairs.jsonl"))[0]) == 1 + good
        (root / "full").unlink()
        assert server.decide(0, "accept")[0] == 200
        assert server.ask("/api/records/0")[1]["decision"]["action"] == "accept"


FORMATS = ["pairs.jsonl", "pairs.jsonl.gz", "pairs.json", "pairs.parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_export_in_the_format_of_the_file(tmp_path, name, capsys):
    """Edited, swapped, rejected, accepted; what nobody changed has its bytes, and the rest is read by `load_preferences`."""
    path = written(tmp_path, name)
    before = records_of(path)
    with Reviewing(path) as server:
        edit = {"paths": [["chosen"]], "value": "There is \u00e9\u6570 $x^2$."}
        for place, action, edits in ((0, "accept", [edit]), (1, "swap", []), (2, "reject", []), (3, "accept", []), (4, "skip", [])):
            assert server.decide(place, action, edits=edits, reason="no")[0] == 200
    out = tmp_path / f"out{''.join(path.suffixes)}"
    assert main(["review", str(path), "--export", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"] == {"records": 6, "changed": 2, "rejected": 1, "accepted": 1, "unreviewed": 2, "written": 5}
    after = records_of(out)
    assert [one["id"] for one in after] == ["p0", "p1", "p3", "p4", "p5"]
    assert after[0]["chosen"] == edit["value"] and (after[1]["chosen"], after[1]["rejected"]) == ("There are 2.", "There are 1.")
    kept = [{name: value for name, value in one.items() if value is not None} for one in after[2:]]
    assert kept == [{name: value for name, value in before[place].items() if value is not None} for place in (3, 4, 5)]
    loaded = load_preferences(out, image_root=tmp_path)
    about = json.loads(loaded[0]["metadata"])["review"]
    assert about["by"] == "anna" and about["was"] == [{"path": ["chosen"], "value": "There are 0."}]
    (rejected,) = read_json_lines(f"{out}.rejected.jsonl")
    assert rejected["reason"] == "no" and rejected["record"]["id"] == "p2"
    if name.endswith(("l", ".json")):
        elements = [text for shard in open_files(out) for text in texts(shard)]
        assert elements[2:] == [text for shard in open_files(path) for text in texts(shard)][3:]
    assert main(["review", str(path), "--export", str(out)]) == 2
    assert main(["review", str(path), "--export", str(tmp_path / "out.txt")]) == 2


def written(folder, name):
    path = pairs(folder)
    lines = read_json_lines(path)
    if name.endswith(".gz"):
        import gzip

        (folder / name).write_bytes(gzip.compress(path.read_bytes()))
    elif name.endswith(".json"):
        (folder / name).write_text(json.dumps(lines, indent=1).replace('"answer_gt": "4"', '"answer_gt":\t"\\u0034"'))
    elif name.endswith(".parquet"):
        from datasets import Dataset

        lines = [{**line, "image": {"bytes": (folder / line["image"]).read_bytes(), "path": line["image"]}} for line in lines]
        Dataset.from_list(lines).to_parquet(folder / name)
    return folder / name


def texts(shard):
    """Records as they are written."""
    if isinstance(shard, ArrayShard):
        return [text for _, _, text in shard.elements()]
    return Path(shard.path).read_text().splitlines()


def records_of(path):
    from mpo.review.files import Records

    records = Records(path)
    return [records.line(place) for place in range(len(records))]


def test_logs_of_others_are_added(tmp_path, capsys):
    """ben reviews a copy whose lines are in another order; both logs give the export of the first file."""
    path = pairs(tmp_path)
    other = tmp_path / "copy.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    other.write_text("".join([lines[5], *lines[:5]]))
    with Reviewing(path) as server:
        server.decide(0, "accept")
    with Reviewing(other, reviewers=("ben",)) as server:
        server.decide(0, "reject", by="ben")
        server.decide(1, "swap", by="ben")
    out = tmp_path / "out.jsonl"
    assert main(["review", str(path), "--from-log", str(log_of(other)), "--export", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"] | {"written": 0} == {"records": 6, "rejected": 1, "disagreeing": 1, "unreviewed": 4, "written": 0}
    assert report["disagreements"] == [1] and report["agreement"][0]["records"] == 1
    alone = pairs(tmp_path, 1, "alone.jsonl", source="elsewhere")
    alone.write_text(alone.read_text().replace("How many in 0?", "Another question"))
    out = tmp_path / "alone.out.jsonl"
    assert main(["review", str(alone), "--from-log", str(log_of(other)), "--export", str(out)]) == 0
    assert "2 decisions are about records" in capsys.readouterr().out  # and not silently nothing
    log_of(path).unlink()
    with Reviewing(path, others=[log_of(other)]) as server:
        assert server.ask("/api/state")[1]["reviewer"] == "anna"
    assert len(read_events(log_of(path))[0]) == 3


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["none.jsonl"], "none.jsonl"), (["empty.jsonl"], "empty.jsonl"), (["."], "output.jsonl"), (["pairs.txt"], "pairs.txt"),
        (["pairs.jsonl", "--image-root", "none"], "none"), (["pairs.jsonl", "--from-log", "none"], "none"),
        (["pairs.jsonl", "--export", "out.jsonl"], "review.jsonl"), (["pairs.jsonl", "--host", "256.0.0.1"], "Give an address"),
        (["meta.json"], "lists files"),
        (["pairs.jsonl", "--reviewer", "a", "--reviewer", "a"], "--reviewer"), (["pairs.jsonl", "--reviewer", ""], "--reviewer"),
    ],
)  # fmt: skip
def test_wrong_words_are_refused_by_name(tmp_path, monkeypatch, capsys, words, name):
    monkeypatch.chdir(tmp_path)
    pairs(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "pairs.txt").write_text("x")
    (tmp_path / "meta.json").write_text(json.dumps({"some": {"root": ".", "annotation": "pairs.jsonl"}}))
    assert main(["review", *words]) == 2
    assert name in capsys.readouterr().err


def test_answers_of_an_evaluation_are_shown_with_their_questions(tmp_path):
    job = tmp_path / "jobs" / "m" / "b" / "direct"
    (job / "images").mkdir(parents=True)
    make_image(1).save(job / "images" / "1.png")
    asked = {"id": "q1", "messages": [{"role": "user", "content": "How many?"}], "images": ["images/1.png"], "greedy": ["7"]}
    (job / "output.jsonl").write_text(json.dumps(asked) + "\n")
    answer = {"model": "m", "benchmark": "b", "mode": "direct", "id": "q1", "ground_truths": ["8"], "dropped": False, "sampled": []}
    answer["greedy"] = [{"text": "Seven: \ud800", "score": 0.0, "reason": "", "none": False}]
    (tmp_path / "answers.jsonl").write_text(json.dumps({**answer, "ranks": {"x": float("nan")}, "other": float("inf")}) + "\n")
    with Reviewing(tmp_path) as server:
        _, view = server.ask("/api/records/0")
        assert view["turns"][0]["parts"][0]["text"] == "How many?" and view["completions"][0]["details"][0]["value"] == "0.0"
        assert server.ask("/api/images/0/image/0")[1][:4] == b"\x89PNG"
        edit = {"paths": [["greedy", 0, "score"]], "value": "1.0"}
        assert server.decide(0, "accept", edits=[edit, {"paths": [["messages", 0, "content"]], "value": "x"}])[0] == 400
        assert server.decide(0, "accept", edits=[edit])[0] == 200
    assert main(["review", str(tmp_path), "--export", str(tmp_path / "out.jsonl")]) == 0
    assert read_json_lines(tmp_path / "out.jsonl")[0]["greedy"][0]["score"] == 1.0


def test_frames_of_a_video_are_images(tmp_path):
    pytest.importorskip("av")
    from conversations import write_video

    write_video(tmp_path / "a.mp4", 24)
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A film."}]
    lines = [{"id": "v", "video": "a.mp4", "conversations": turns}, {"id": "w", "video": "../a.mp4", "conversations": turns}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Reviewing(tmp_path / "chat.jsonl") as server:
        images = server.ask("/api/records/0")[1]["images"]
        assert len(images) >= 8 and images[1]["name"] == "video 1, frame 2"
        assert server.ask(f"/api/images/{images[-1]['id']}")[1][:4] == b"\x89PNG"
        assert server.ask("/api/images/0/video/0?frame=99")[0] == 404
        (failed,) = server.ask("/api/records/1")[1]["images"]
        assert failed["id"] is None and "../a.mp4" in failed["failed"]


def test_rejected_lines_that_are_no_records_are_left_out(tmp_path, capsys):
    """One is named in the file of rejected ones as it was; the other stays in its place, byte by byte."""
    path = pairs(tmp_path, 2)
    path.write_bytes(b'{"a": \xe9}\n[1]\n\n' + path.read_bytes())
    with Reviewing(path) as server:
        assert server.decide(0, "reject")[0] == 200
    path.write_bytes(b"\xef\xbb\xbf\r\n[2]\n" + path.read_bytes())  # decisions about such lines follow them, too
    assert main(["review", str(path), "--export", str(tmp_path / "out.jsonl"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"] == {"records": 5, "rejected": 1, "unreviewed": 4, "written": 4} and not report["unmatched"]
    assert (tmp_path / "out.jsonl").read_bytes().startswith(b"[2]\n[1]\n{")
    (rejected,) = read_json_lines(tmp_path / "out.jsonl.rejected.jsonl")
    assert rejected["record"]["line"].startswith('{"a": \\xe9}')


def test_a_filter_waits_for_what_it_is_about(tmp_path, monkeypatch):
    """While records are still being read, a filter and an order give no part of their records, and others are not kept waiting."""
    import numpy as np

    from mpo.review import facets

    path, go, own = pairs(tmp_path, 40, type="count"), threading.Event(), facets.facets
    reached = threading.Event()

    def slow(line):
        if line["id"] == "p20":
            reached.set()
            go.wait(20)
        return own(line)

    monkeypatch.setattr(facets, "facets", slow)
    with Reviewing(path) as server:
        found = {}

        def ask(words):
            found[words] = np.frombuffer(server.ask(f"/api/queue?{words}")[1], "<u4").tolist()

        threads = [
            threading.Thread(target=ask, args=(words,)) for words in ("source=s1", "order=longest", "verdict=none", "type=count")
        ]
        for thread in threads:
            thread.start()
        assert reached.wait(20)
        ask("search=how%20many%20in%207")
        ask("state=unreviewed")
        assert server.decide(0, "accept")[0] == 200
        assert {words: len(places) for words, places in found.items()} == {"search=how%20many%20in%207": 1, "state=unreviewed": 40}
        assert server.ask("/api/state")[1]["facets"] is None
        go.set()
        for thread in threads:
            thread.join(20)
        assert found["source=s1"] == [*range(1, 40, 2)] and found["verdict=none"] == []
        assert found["type=count"] == [*range(40)]
        assert sorted(found["order=longest"]) == [*range(40)] and found["order=longest"][0] >= 10


def test_a_record_is_shown_before_the_index_is_complete(tmp_path, monkeypatch):
    """The reading of the rest is held back: the first record comes, with its decision, and deciding waits."""
    from mpo.review import files

    path = pairs(tmp_path, 40, filler="x" * 200)
    with Reviewing(path) as server:
        server.decide(0, "accept")
    monkeypatch.setattr(files, "BLOCK", 512)
    go, read = threading.Event(), os.pread

    def slow(file, size, start):
        if size == 512 and start > 4000:
            go.wait(20)
        return read(file, size, start)

    monkeypatch.setattr(files.os, "pread", slow)
    with Reviewing(path) as server:
        status, view = server.ask("/api/records/0")
        assert status == 200 and view["decision"]["action"] == "accept" and not server.review.records.ready
        thread = threading.Thread(target=server.decide, args=(1, "reject"))
        thread.start()
        assert not server.ask("/api/state")[1]["counted"]
        go.set()
        thread.join(20)
        assert len(server.review.records) == 40 and server.ask("/api/records/1")[1]["decision"]["action"] == "reject"
