"""The kernel that a chapter is executed by, and the way its messages come."""

from queue import Empty

from jupyter_client import AsyncKernelManager
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from traitlets import Type

PATIENCE = 5  # seconds, after which a channel is looked at unasked


class Channel(AsyncZMQSocketChannel):
    """Messages of a kernel, which are never waited for without end.

    ZeroMQ tells an event loop of a message once. On a busy machine that is missed now
    and then; the message lies there, and both sides wait for good. Whoever looks again
    finds it.
    """

    async def get_msg(self, timeout=None):
        """The next message; raises Empty after ``timeout`` seconds, None: never."""
        while timeout is None:
            try:
                return await super().get_msg(PATIENCE)
            except Empty:
                pass
        return await super().get_msg(timeout)


class Client(AsyncKernelClient):
    """Of a kernel, with such channels."""

    shell_channel_class = Type(Channel)
    iopub_channel_class = Type(Channel)


class Manager(AsyncKernelManager):
    """Of a kernel, with such a client."""

    client_factory = Type(Client)
