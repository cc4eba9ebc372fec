"""lmsys: fast Transformer language-model training, written from scratch and measured beside the best.

Importing the package imports nothing heavy; each module is imported when it is first used.
"""

__version__ = "0.1.0"
