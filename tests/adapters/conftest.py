"""One PyTorch thread, as in the tests of learning."""

from tests.learning.conftest import one_thread

__all__ = ["one_thread"]
