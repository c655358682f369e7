"""lmdaemon: the SessionExpired method of Lucky Monaco as a small daemon.

What stands here is what a plug-in may import; the daemon itself starts in `lmdaemon.__main__`.
"""

from lmdaemon.model import Notice, Refuse, SessionEnded
from lmdaemon.version import __version__

__all__ = ["Notice", "Refuse", "SessionEnded", "__version__"]
