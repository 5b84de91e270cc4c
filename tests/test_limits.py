"""The room that request bodies share; sizes and times of bodies are tested over the network in test_serving.py."""

import asyncio

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("starlette")

from smartfrz.serving import limits
from smartfrz.serving.limits import BodyLimits, Refused, Room


async def hold(room, size, name, entered, leave):
    async with room.reserve(size):
        entered.append(name)
        await leave.wait()


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def test_requests_enter_in_the_order_of_their_arrival():
    async def run():
        room, entered = Room(10), []
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
        async with room.reserve(10):  # everything was given back
            pass

    asyncio.run(asyncio.wait_for(run(), 10))


def test_requests_that_are_cancelled_give_their_place_and_their_room_back():
    async def run():
        room, entered, never = Room(10), [], asyncio.Event()
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
        async with room.reserve(10):
            pass

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_queue_that_is_full(monkeypatch):
    monkeypatch.setattr(limits, "MAX_QUEUE", 1)

    async def run():
        room, entered, leave = Room(10), [], asyncio.Event()
        tasks = [asyncio.create_task(hold(room, 10, number, entered, leave)) for number in range(2)]
        await settle()
        with pytest.raises(Refused, match="Try again later") as caught:
            async with room.reserve(1):
                pass
        assert caught.value.status == 503
        leave.set()
        await asyncio.gather(*tasks)
        assert entered == [0, 1]

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_body_that_does_not_arrive_in_time(monkeypatch):
    monkeypatch.setattr(limits, "READ_SECONDS", 0.05)
    monkeypatch.setattr(limits, "DISCARD_SECONDS", 0.05)
    sent = []

    async def application(scope, receive, send):
        raise AssertionError("the request is not complete")

    async def receive():
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"1000")]}
    asyncio.run(BodyLimits(application, 1000)(scope, receive, send))
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert b"did not arrive within" in sent[1]["body"]
