"""An answer of a kernel that arrives while papermill sends something is read."""

import asyncio
import time
from queue import Empty

import pytest
import zmq
import zmq.asyncio
from jupyter_client.session import Session

from notebooks.kernel import LONGEST_WAIT, Manager, ShellChannel


async def answer_during_a_send(channel_class):
    """Wait for an answer; let it arrive, and send past asyncio before the loop can see it."""
    session = Session(key=b"")
    with zmq.Context() as plain, zmq.asyncio.Context() as context:
        with plain.socket(zmq.ROUTER) as kernel, context.socket(zmq.DEALER) as socket:
            port = kernel.bind_to_random_port("tcp://127.0.0.1")
            socket.connect(f"tcp://127.0.0.1:{port}")
            channel = channel_class(socket, session)
            channel.send(session.msg("execute_request"))
            address, request = session.recv(kernel, mode=0)
            waiting = asyncio.ensure_future(channel.get_msg())
            await asyncio.sleep(0.2)  # now it waits for a signal
            session.send(kernel, "execute_reply", parent=request, ident=address)
            time.sleep(0.2)  # the signal is there, and not seen
            channel.send(session.msg("comm_msg"))
            done, _ = await asyncio.wait([waiting], timeout=5 * LONGEST_WAIT)
            waiting.cancel()
            return done.pop().result()["msg_type"] if done else None


def test_an_answer_is_read_although_its_signal_was_lost():
    assert asyncio.run(answer_during_a_send(ShellChannel)) == "execute_reply"


def test_a_wait_ends_when_it_should():
    async def wait(timeout):
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
            await ShellChannel(socket, Session(key=b"")).get_msg(timeout)

    started = time.monotonic()
    with pytest.raises(Empty):
        asyncio.run(wait(LONGEST_WAIT + 0.2))
    assert LONGEST_WAIT < time.monotonic() - started < LONGEST_WAIT + 10


def test_papermill_is_given_that_channel():
    client = Manager().client()
    assert isinstance(client.shell_channel_class, type)
    assert issubclass(client.shell_channel_class, ShellChannel)
