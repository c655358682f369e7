"""lmdaemon: the SessionExpired method of Lucky Monaco as a small daemon.

Plug-ins may import the names below and nothing else. The daemon starts in `lmdaemon.__main__`.
"""

from lmdaemon.model import Notice, Refuse, SessionEnded
from lmdaemon.version import __version__

__all__ = ["Notice", "Refuse", "SessionEnded", "__version__"]
