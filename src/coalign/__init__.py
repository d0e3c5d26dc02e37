"""coalign: data-efficient language-image pre-training."""

__version__ = "0.1.0"
