"""coalign: data-efficient language-image pre-training."""

from coalign.version import __version__ as __version__
