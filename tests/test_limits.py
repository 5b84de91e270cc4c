"""The room that request bodies share; limits over the network are tested in test_serving.py and test_serving_attacks.py."""

import asyncio

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from smartfrz.serving import limits
from smartfrz.serving.connections import Connections, fit_open_files
from smartfrz.serving.limits import BodyLimits
from smartfrz.serving.options import ServeOptions
from smartfrz.serving.room import Room, Upload


def options(**changes):
    defaults = {
        "host": "",
        "port": 0,
        "grpc_port": 0,
        "max_batch": 1,
        "max_delay_ms": 0,
        "max_request_bytes": 1000,
        "max_json_bytes": 1000,
        "max_connections": 10,
        "max_connections_per_peer": 10,
        "header_seconds": 1,
        "stall_seconds": 60,
        "min_rate": 1,
        "body_seconds": 60,
        "device": "cpu",
        "threads": 1,
        "grace_seconds": 1,
    }
    return ServeOptions(**defaults | changes)


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


async def hold(room, size, name, entered, leave):
    upload = Upload(size)
    try:
        await room.take(upload, size)
        room.complete(upload)
        entered.append(name)
        await leave.wait()
    finally:
        room.give_back(upload)


async def is_empty(room, size):
    """Whether everything was given back."""
    upload = Upload(size)
    await asyncio.wait_for(room.take(upload, size), 1)
    return True


def test_bodies_enter_in_the_order_of_their_arrival():
    async def run():
        room, entered = Room(10, 10), []
        leave = {name: asyncio.Event() for name in "abcd"}
        sizes = {"a": 6, "b": 8, "c": 1, "d": 2}  # c and d would fit beside a, but b came first
        tasks = [asyncio.create_task(hold(room, sizes[name], name, entered, leave[name])) for name in "abcd"]
        await settle()
        assert entered == ["a"]
        leave["a"].set()
        await settle()
        assert entered == ["a", "b", "c"]
        leave["b"].set()
        await settle()
        assert entered == ["a", "b", "c", "d"]
        leave["c"].set()
        leave["d"].set()
        await asyncio.gather(*tasks)
        assert await is_empty(room, 10)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_bodies_that_are_cancelled_give_their_place_and_their_room_back():
    async def run():
        room, entered, never = Room(10, 10), [], asyncio.Event()
        tasks = [asyncio.create_task(hold(room, size, size, entered, never)) for size in (7, 9, 8, 3)]
        await settle()
        assert entered == [7]
        tasks[1].cancel()  # while it is the next to enter
        tasks[2].cancel()  # while it waits behind that one
        await settle()
        assert entered == [7, 3]
        tasks[0].cancel()
        tasks[3].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await is_empty(room, 10)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_bodies_that_arrive_in_pieces_never_wait_for_each_other_for_ever():
    async def upload_pieces(room, ended):
        upload = Upload(10)
        for _ in range(10):
            await room.take(upload, 1)
            await asyncio.sleep(0)
        room.complete(upload)
        ended.append(upload.held)
        await asyncio.sleep(0)
        room.give_back(upload)

    async def run():
        room, ended = Room(20, 10), []  # room for two of fifty
        await asyncio.gather(*(upload_pieces(room, ended) for _ in range(50)))
        assert ended == [10] * 50
        assert room.stuck_seconds == 0
        assert await is_empty(room, 20 - 10)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_the_first_in_the_line_leaves_the_reserve_to_the_next_when_it_is_refused():
    async def run():
        room = Room(20, 10)
        held, first, second = Upload(10), Upload(10), Upload(10)
        await room.take(held, 10)
        await room.take(first, 5)  # from the reserve
        waiting = asyncio.create_task(room.take(second, 8))
        await settle()
        await asyncio.sleep(0.02)
        assert room.stuck_seconds > 0.01
        room.give_back(first)
        await asyncio.wait_for(waiting, 1)
        assert second.held == 8

    asyncio.run(asyncio.wait_for(run(), 10))


def serve(app, receive, **changes):
    """Pass one request through the limits, and return what was sent."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"1000")]}
    chosen = options(**changes)
    asyncio.run(asyncio.wait_for(BodyLimits(app, chosen, Connections(chosen))(scope, receive, send), 10))
    return sent


async def incomplete(scope, receive, send):
    raise AssertionError("the request is not complete")


async def drip():
    await asyncio.sleep(0.02)
    return {"type": "http.request", "body": b"x", "more_body": True}


async def stop():
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("receive", "changes"),
    [
        (drip, {"body_seconds": 0.05}),
        (drip, {"stall_seconds": 0.1, "min_rate": 1000}),
        (stop, {"stall_seconds": 0.05}),
    ],
    ids=["too long", "too slowly", "stops"],
)
def test_a_body_that_does_not_arrive_in_time(receive, changes):
    sent = serve(incomplete, receive, **changes)
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert b"did not arrive within" in sent[1]["body"]


def test_a_body_for_which_there_is_no_room(monkeypatch):
    monkeypatch.setattr(limits, "ROOM_SECONDS", 0.05)

    async def never(self, upload, size):
        await asyncio.sleep(60)

    monkeypatch.setattr(Room, "take", never)
    sent = serve(incomplete, drip)
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"1") in sent[0]["headers"]
    assert b"Try again later" in sent[1]["body"]


def test_limits_of_open_files(monkeypatch, caplog):
    resource = pytest.importorskip("resource")
    now = (256, 4096)
    monkeypatch.setattr(resource, "getrlimit", lambda _: now)
    chosen = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: chosen.append(pair))
    assert fit_open_files(1000) == 1000
    assert chosen == [(2192, 4096)]
    assert not caplog.records
    now = (256, 512)
    assert fit_open_files(1000) == 160
    assert "may open 512 files, enough for 160 connections; --max-connections is 1000" in caplog.text
