"""Training data: conversations about pictures, and batches of them in an order that is a formula.

Not imported by `vfjax` itself: only training needs it.
"""

from vfjax.data.conversations import Conversations, Sample
from vfjax.data.pipeline import Batches

__all__ = ["Batches", "Conversations", "Sample"]
