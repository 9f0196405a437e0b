"""Nothing grows: 1,000 requests with changing images, plans and questions leave what 50 left.

Bounds are set small enough that 50 requests reach them; what grows beyond them would grow for ever.
"""

from __future__ import annotations

import gc
import threading
import types

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from app import asking, looking
from app.desk import Desk
from app.session import Held, Session, Store
from model.types import Sampling
from tests.app.given import HIRES, TAPS

REQUESTS, SETTLED = 1000, 50
TENSORS = 64_000  # bytes more that tensors may take: less than one request's
RESIDENT = 24_000_000  # bytes more of the process: less than 1,000 requests' answers, of 25 kB each
OBJECTS = 3_000  # more of Python's: three a request


def ask(desk: Desk, session: Session, number: int) -> None:
    """One visitor's request as the page makes it; every tenth is looked into, every seventh is given up."""
    draw = np.random.default_rng(number)
    image = Image.fromarray(draw.integers(0, 256, (24 + number % 3 * 8, 32, 3), dtype=np.uint8))
    key = desk.store.hold(session.visitor, Held(image, f"{number}.png"))
    plan = f"base@0,{number % 2}@{1 + number % 3}*{draw.uniform(-2, 2):.3f}"
    name = (HIRES, TAPS)[number % 2]
    settings = Sampling(2, temperature=number % 3 / 2, seed=number)
    asked = asking.prepare(desk, model=name, plan=plan, question=f"What is {number}?", images=[key], settings=settings)
    steps = asking.stream(asked)
    if number % 7 == 0:
        with asked.engine.stream(asked.prompt, asked.plan, asked.sampling) as stream:
            next(stream)
        return
    *_, (answer, _) = steps
    record = desk.store.record(asking.keep(desk, session, asked, answer))
    if number % 10 == 0:
        looking.see(asked.engine, record)


def tensor_bytes() -> int:
    """Of every tensor that is alive, each storage once."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor or type(thing) is torch.nn.Parameter:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.slow
def test_a_thousand_requests_leave_what_fifty_left(zoo):
    desk = Desk(zoo, store=Store(image_bytes=60_000, records=12, record_bytes=2_000_000))
    engines = [zoo.get(name) for name in (HIRES, TAPS)]
    limits = [engine.cache.max_bytes for engine in engines]

    def measure() -> dict[str, int]:
        gc.collect()
        frames = sum(type(thing) is types.FrameType for thing in gc.get_objects())
        return {
            "tensors": tensor_bytes(),
            "resident": psutil.Process().memory_info().rss,
            "objects": len(gc.get_objects()),
            "frames": frames,
            "threads": threading.active_count(),
            "records": len(desk.store),
            "features": sum(engine.cache.bytes for engine in engines),
            "visitors": len(desk.store._stops),
        }

    try:
        for engine in engines:
            engine.cache.max_bytes = 60_000  # three images of one, ten of the other
            engine.cache.clear()
        before = {}
        for number in range(REQUESTS):
            session = Session(f"visitor {number % 5}")
            ask(desk, session, number)
            if number % 5 == 4:
                desk.store.forget(session)
            if number + 1 == SETTLED:
                before = measure()
        after = measure()
    finally:
        for engine, limit in zip(engines, limits, strict=True):
            engine.cache.max_bytes = limit
            engine.cache.clear()
    assert before["features"] > 90_000 and after["features"] <= 120_000  # it was full, and stays so
    assert after["tensors"] <= before["tensors"] + TENSORS, (before, after)
    assert after["resident"] <= before["resident"] + RESIDENT, (before, after)
    assert after["objects"] <= before["objects"] + OBJECTS, (before, after)
    assert (after["threads"], after["visitors"]) == (before["threads"], before["visitors"])
    assert after["records"] <= before["records"] + 2 and after["frames"] <= before["frames"] + 2
