"""A kernel manager for papermill that misses no answer of a kernel.

While papermill waits for the answer to a cell, an ``Output`` widget of that cell may make it send a
message on the same socket. `jupyter_client` sends past asyncio, which can swallow the one signal
that the answer has arrived; papermill then waits for ever, with an idle kernel. Here it looks again.
"""

import time
from queue import Empty

from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.manager import AsyncKernelManager
from traitlets import Type

LONGEST_WAIT = 1.0  # seconds until the socket is asked again whether something has arrived


class ShellChannel(AsyncZMQSocketChannel):
    """The channel of answers, which looks into its socket every second."""

    async def get_msg(self, timeout=None):
        """Return the next message, a dict; raise `queue.Empty` after `timeout` seconds, if given."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            wait = LONGEST_WAIT if end is None else min(LONGEST_WAIT, end - time.monotonic())
            try:
                return await super().get_msg(max(wait, 0))
            except Empty:
                if end is not None and time.monotonic() >= end:
                    raise


class Client(AsyncKernelClient):
    """A client with that channel."""

    shell_channel_class = Type(ShellChannel)


class Manager(AsyncKernelManager):
    """A manager with that client: ``kernel_manager_class`` of papermill."""

    client_factory = Type(Client)
