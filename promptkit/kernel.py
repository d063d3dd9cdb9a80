"""The kernel that a chapter is executed by, and the way its messages come."""

import math
from queue import Empty

from jupyter_client import AsyncKernelManager
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from traitlets import Type

# Seconds after which a channel is looked at unasked: less than the 4 for which nbclient
# waits for the last outputs of a cell.
PATIENCE = 1


class Channel(AsyncZMQSocketChannel):
    """Messages of a kernel, which are never waited for long without looking.

    ZeroMQ tells an event loop of a message once. On a busy machine that is missed now
    and then; the message lies there, and both sides wait for good. Whoever looks again
    finds it.
    """

    async def get_msg(self, timeout=None):
        """The next message; raises Empty after ``timeout`` seconds, None: never."""
        left = math.inf if timeout is None else timeout
        while left > PATIENCE:
            try:
                return await super().get_msg(PATIENCE)
            except Empty:
                left -= PATIENCE
        return await super().get_msg(left)


class Client(AsyncKernelClient):
    """Of a kernel, with such channels."""

    shell_channel_class = Type(Channel)
    iopub_channel_class = Type(Channel)


class Manager(AsyncKernelManager):
    """Of a kernel, with such a client."""

    client_factory = Type(Client)
