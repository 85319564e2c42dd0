"""How long work talks to whoever started it: messages, warnings and progress, without printing anything itself."""

import logging

logger = logging.getLogger("affcache")


class Listener:
    """Receives what long work has to say. This base class logs warnings and is otherwise silent.

    Pass an instance of a subclass to ``extract``, ``fit`` or ``score`` to show messages and progress.
    """

    def message(self, text: str) -> None:
        """One finished fact worth reading, for instance how many labels were left out of a join."""

    def warning(self, text: str) -> None:
        """Something the user should know before trusting the result."""
        logger.warning(text)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Report that ``done`` of ``total`` units ("crop", "epoch") are finished; ``note`` says how the work stands."""
